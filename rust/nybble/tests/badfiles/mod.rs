//! Builds model files byte by byte, good ones and broken ones.

use std::path::Path;
use std::time::{Duration, Instant};

use nybble::format::gguf::Gguf;
use nybble::format::mapped::MappedFile;
use nybble::format::safetensors::SafeTensors;

/// Measures work: the processor time of this thread where the system tells it, because a busy machine stretches the
/// time on the wall; that elsewhere.
pub(crate) struct Stopwatch {
    cpu: Option<Duration>,
    wall: Instant,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self { cpu: Self::cpu(), wall: Instant::now() }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        match (self.cpu, Self::cpu()) {
            (Some(start), Some(now)) => now.saturating_sub(start),
            _ => self.wall.elapsed(),
        }
    }

    fn cpu() -> Option<Duration> {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        let busy = Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?);
        (!busy.is_zero()).then_some(busy) // zero where the kernel keeps no such count
    }
}

/// A safetensors file with any header.
pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// A good safetensors file with two tensors: `a` F32 [2, 3] and `b` I8 [4].
pub(crate) fn small_safetensors() -> Vec<u8> {
    safetensors(
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"I8","shape":[4],"data_offsets":[24,28]}}"#,
        &(0..28).collect::<Vec<u8>>(),
    )
}

/// Opens safetensors bytes under the name `f`; panics unless that fails; the message.
pub(crate) fn safetensors_error(bytes: Vec<u8>) -> String {
    match SafeTensors::from_file(MappedFile::from_bytes("f", bytes)) {
        Ok(file) => panic!("opened, with {:?}", file.tensors()),
        Err(error) => error.to_string(),
    }
}

/// Opens GGUF bytes under the name `f`; panics unless that fails; the message.
pub(crate) fn gguf_error(bytes: Vec<u8>) -> String {
    match Gguf::from_file(MappedFile::from_bytes("f", bytes)) {
        Ok(file) => panic!("opened, with {:?}", file.tensors()),
        Err(error) => error.to_string(),
    }
}

pub(crate) const U32: u32 = 4;
pub(crate) const BOOL: u32 = 7;
pub(crate) const TEXT: u32 = 8;
pub(crate) const ARRAY: u32 = 9;

/// A length and the bytes of a text.
pub(crate) fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// The parts of a GGUF file; every field can be made wrong.
#[derive(Clone)]
pub(crate) struct GgufFile {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// Instead of the true counts.
    pub(crate) tensor_count: Option<u64>,
    pub(crate) metadata_count: Option<u64>,
    /// Name, type code and bytes of the value.
    pub(crate) metadata: Vec<(Vec<u8>, u32, Vec<u8>)>,
    pub(crate) tensors: Vec<GgufTensor>,
    /// Where the data is padded to begin.
    pub(crate) alignment: usize,
    pub(crate) data: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: Vec<u8>,
    pub(crate) rank: Option<u32>,
    /// As in the file: fastest first.
    pub(crate) dims: Vec<u64>,
    pub(crate) code: u32,
    pub(crate) offset: u64,
}

impl GgufTensor {
    pub(crate) fn new(name: &str, dims: &[u64], code: u32, offset: u64) -> Self {
        Self { name: name.into(), rank: None, dims: dims.into(), code, offset }
    }
}

impl GgufFile {
    /// No metadata, no tensors.
    pub(crate) fn empty() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            metadata_count: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            data: Vec::new(),
        }
    }

    /// Some metadata of several types, `a` F32 [2, 3] and `b` `Q8_0` [32].
    pub(crate) fn small() -> Self {
        let vocabulary =
            [&TEXT.to_le_bytes()[..], &3_u64.to_le_bytes(), &text("<s>"), &text(""), &text("é")].concat();
        let scores = [&6_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &0.5_f32.to_le_bytes()].concat();
        Self {
            metadata: vec![
                ("general.architecture".into(), TEXT, text("llama")),
                ("llama.block_count".into(), U32, 2_u32.to_le_bytes().into()),
                ("flag".into(), BOOL, vec![1]),
                ("tokens".into(), ARRAY, vocabulary),
                ("scores".into(), ARRAY, scores),
            ],
            tensors: vec![GgufTensor::new("a", &[3, 2], 0, 0), GgufTensor::new("b", &[32], 8, 32)],
            data: (0..96).collect(),
            ..Self::empty()
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = self.magic.to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        file.extend(self.metadata_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (name, code, value) in &self.metadata {
            file.extend(text(name));
            file.extend(code.to_le_bytes());
            file.extend(value);
        }
        for tensor in &self.tensors {
            file.extend(text(&tensor.name));
            file.extend(tensor.rank.unwrap_or(tensor.dims.len() as u32).to_le_bytes());
            file.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            file.extend(tensor.code.to_le_bytes());
            file.extend(tensor.offset.to_le_bytes());
        }
        if !self.data.is_empty() {
            file.resize(file.len().next_multiple_of(self.alignment), 0);
        }
        file.extend(&self.data);
        file
    }
}

/// A folder with a configuration and two shards: `a` F32 [2, 3] and `b` I8 [4] in the first, `c` U8 [2] in the second.
pub(crate) fn write_sharded(folder: &Path) {
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).expect("a writable folder");
    put("config.json", br#"{"model_type":"llama","hidden_size":8}"#);
    put("model-00001-of-00002.safetensors", &small_safetensors());
    put(
        "model-00002-of-00002.safetensors",
        &safetensors(r#"{"c":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#, &[7, 8]),
    );
    put(
        "model.safetensors.index.json",
        br#"{"metadata":{"total_size":30},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors","c":"model-00002-of-00002.safetensors"}}"#,
    );
}
