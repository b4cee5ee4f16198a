//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::{Component, Path};

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use super::foreign::{is_pickle_name, pickle_error};
use super::json::{TABLE_BYTES, read_text};
use super::strict::Faults;
use super::tensor::{name_fault, quoted};
use crate::error::{Error, Result};

/// Most shards of a model.
const MAX_SHARDS: usize = 4096;

/// Most tensors of a sharded model.
const MAX_TENSORS: usize = 1 << 20;

/// The index, checked by itself: the names of the shards are plain file names.
#[derive(Default)]
pub(crate) struct Index {
    /// File names of the shards, in the order of their first mention.
    pub(crate) shards: Vec<String>,
    /// Shard of each tensor.
    pub(crate) tensors: BTreeMap<String, usize>,
}

impl Index {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, TABLE_BYTES)?;
        let index = Faults::read(path, "index", &text, |faults, json| Seed { faults }.deserialize(json))?;
        for shard in &index.shards {
            if is_pickle_name(Path::new(shard)) {
                return Err(pickle_error(&path.with_file_name(shard)));
            }
            if let Some(found) = file_name_fault(shard) {
                return Err(Error::format(path, "weight_map", "names of files in the folder", found));
            }
        }
        if index.tensors.is_empty() {
            return Err(Error::format(path, "weight_map", "at least one tensor", "none"));
        }
        Ok(index)
    }
}

/// What keeps `name` from being the plain name of a file in the folder.
pub(crate) fn file_name_fault(name: &str) -> Option<String> {
    let mut parts = Path::new(name).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    // Separators and drive letters of other systems are refused everywhere, so that a folder is good or bad on all of them.
    if plain && !name.contains(['/', '\\', ':']) && !name.chars().any(char::is_control) {
        return None;
    }
    Some(quoted(name))
}

struct Seed<'a> {
    faults: &'a Faults,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Index;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Index, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let faults = self.faults;
        let mut index = None;
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?; // sizes and the like, for people
                continue;
            }
            if index.is_some() {
                return Err(faults.fail(key, "one", "a second one"));
            }
            let weights = map.next_value_seed(WeightMap { faults });
            index = Some(weights.map_err(faults.about(|| key, "an object of tensor and file names"))?);
        }
        index.ok_or_else(|| faults.fail("weight_map", "one", "none"))
    }
}

struct WeightMap<'a> {
    faults: &'a Faults,
}

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = Index;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Index, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensor and file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let faults = self.faults;
        let mut index = Index::default();
        let mut numbers = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if let Some((expected, found)) = name_fault(&name) {
                return Err(faults.fail(format!("tensor name {}", quoted(&name)), expected, found));
            }
            let shard = map.next_value::<String>().map_err(faults.about(|| quoted(&name), "a file name"))?;
            let number = match numbers.entry(shard) {
                Entry::Occupied(number) => *number.get(),
                Entry::Vacant(slot) => {
                    index.shards.push(slot.key().clone());
                    *slot.insert(index.shards.len() - 1)
                }
            };
            if index.shards.len() > MAX_SHARDS {
                return Err(faults.fail("weight_map", format!("at most {MAX_SHARDS} files"), "more"));
            }
            match index.tensors.entry(name) {
                Entry::Vacant(slot) => slot.insert(number),
                Entry::Occupied(slot) => {
                    return Err(faults.fail(
                        quoted(slot.key()),
                        "one file for this tensor",
                        "a second entry",
                    ));
                }
            };
            if index.tensors.len() > MAX_TENSORS {
                return Err(faults.fail("weight_map", format!("at most {MAX_TENSORS} tensors"), "more"));
            }
        }
        Ok(index)
    }
}
