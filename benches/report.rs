//! What benches that print a table share: their options, the blocks they measure, medians.
#![allow(dead_code)] // no bench needs all of it

use nybble::threads::Pool;

/// Feed-forward blocks of models of these sizes: hidden size and neurons.
pub(crate) const BLOCKS: [(&str, usize, usize); 3] =
    [("135M", 576, 1536), ("1.1B", 2048, 5632), ("3B", 3072, 8192)];

/// Where a block's weights come from.
pub(crate) const PLACES: [&str; 2] = ["l3", "dram"];

/// Layers of `bytes` to walk over, so that their weights come from there: what 12 MB hold, or at least 192 MB.
pub(crate) fn layers(place: &str, bytes: usize) -> usize {
    if place == "l3" { ((12 << 20) / bytes).max(1) } else { (192usize << 20).div_ceil(bytes) }
}

/// What the command line says.
pub(crate) struct Options {
    /// Everything once and small.
    pub(crate) quick: bool,
    /// What is measured has this in its name.
    pub(crate) filter: String,
    csv: Option<String>,
}

impl Options {
    /// Reads `--quick`, `--csv FILE`, `--filter TEXT` and the bench's `own` options, which have values.
    pub(crate) fn read(own: &mut [(&str, &mut String)]) -> Self {
        let mut found = Self { quick: false, filter: String::new(), csv: None };
        let mut bench = false;
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "--quick" => found.quick = true,
                "--bench" => bench = true, // cargo bench adds it
                "--csv" => found.csv = words.next(),
                "--filter" => found.filter = words.next().unwrap_or_default(),
                other => match own.iter_mut().find(|(name, _)| *name == other) {
                    Some((_, value)) => **value = words.next().unwrap_or_default(),
                    None => panic!("{other}: expected an option that the bench's first lines name"),
                },
            }
        }
        found.quick |= !bench; // `cargo test --benches`
        found
    }

    /// Writes the table, if there is a file for it.
    pub(crate) fn save(&self, table: &str) {
        if let Some(path) = &self.csv {
            std::fs::write(path, table).expect("the CSV file can be written");
        }
    }
}

/// As many threads as `NYBBLE_THREADS` says.
pub(crate) fn pool() -> Pool {
    Pool::new(Pool::default_threads().expect("NYBBLE_THREADS is a number")).expect("a pool")
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
