//! The JSON header of a safetensors file, read straight into tensors.
//!
//! It is not read into a general JSON value first: a hostile header of a hundred megabytes would take gigabytes that way.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};

use super::dtype::{Dtype, SAFETENSORS_NAMES};
use super::safetensors::MAX_RANK;
use super::strict::Faults;
use super::tensor::{MAX_TENSORS, TensorInfo, name_fault, quoted};
use crate::error::Result;

/// Most texts in a header's metadata.
const MAX_METADATA: usize = 1 << 14;

/// What the header says. Each tensor's range has the length its type and shape give; whether the ranges fit together and
/// into the file is not checked here.
#[derive(Default)]
pub(crate) struct Header {
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Header {
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        Faults::read(path, "header", text, |faults, json| HeaderSeed { faults }.deserialize(json))
    }
}

/// Implements [`DeserializeSeed`] by visiting a map or a sequence.
macro_rules! seed {
    ($seed:ident -> $value:ty, $ask:ident) => {
        impl<'de> DeserializeSeed<'de> for $seed<'_> {
            type Value = $value;

            fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<$value, D::Error> {
                json.$ask(self)
            }
        }
    };
}

struct HeaderSeed<'a> {
    faults: &'a Faults,
}

seed!(HeaderSeed -> Header, deserialize_map);

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let faults = self.faults;
        let mut header = Header::default();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata.is_some() {
                    return Err(faults.fail(name, "one entry", "a second one"));
                }
                let texts = map.next_value_seed(MetadataSeed { faults });
                metadata = Some(texts.map_err(faults.about(|| name, "an object of texts"))?);
                continue;
            }
            if let Some((expected, found)) = name_fault(&name) {
                return Err(faults.fail(format!("tensor name {}", quoted(&name)), expected, found));
            }
            if header.tensors.len() == MAX_TENSORS {
                return Err(faults.fail("header", format!("at most {MAX_TENSORS} tensors"), "more"));
            }
            let slot = match header.tensors.entry(name) {
                Entry::Vacant(slot) => slot,
                Entry::Occupied(slot) => {
                    return Err(faults.fail(quoted(slot.key()), "one tensor of this name", "a second one"));
                }
            };
            let tensor = map
                .next_value_seed(TensorSeed { faults, name: slot.key() })
                .map_err(faults.about(|| quoted(slot.key()), "dtype, shape and data_offsets"))?;
            slot.insert(tensor);
        }
        header.metadata = metadata.unwrap_or_default();
        Ok(header)
    }
}

struct MetadataSeed<'a> {
    faults: &'a Faults,
}

seed!(MetadataSeed -> BTreeMap<String, String>, deserialize_map);

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut texts = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            if texts.len() == MAX_METADATA {
                let expected = format!("at most {MAX_METADATA} texts");
                return Err(self.faults.fail("__metadata__", expected, "more"));
            }
            let text = map
                .next_value::<String>()
                .map_err(self.faults.about(|| format!("__metadata__: {}", quoted(&key)), "a text"))?;
            match texts.entry(key) {
                Entry::Vacant(slot) => slot.insert(text),
                Entry::Occupied(slot) => {
                    let item = format!("__metadata__: {}", quoted(slot.key()));
                    return Err(self.faults.fail(item, "each key once", "a second one"));
                }
            };
        }
        Ok(texts)
    }
}

struct TensorSeed<'a> {
    faults: &'a Faults,
    name: &'a str,
}

seed!(TensorSeed -> TensorInfo, deserialize_map);

impl TensorSeed<'_> {
    fn item(&self, field: &str) -> String {
        format!("{}: {field}", quoted(self.name))
    }

    fn dtype<E: serde::de::Error>(&self, name: &str) -> Result<Dtype, E> {
        if let Some(dtype) = Dtype::from_safetensors(name) {
            return Ok(dtype);
        }
        if Dtype::is_other_safetensors(name) {
            let detail = format!("the types read are {SAFETENSORS_NAMES}");
            return Err(self.faults.unsupported(format!("{}: type {name}", quoted(self.name)), detail));
        }
        Err(self.faults.fail(self.item("dtype"), format!("one of {SAFETENSORS_NAMES}"), quoted(name)))
    }

    /// Puts the fields together and compares the length of the range with the shape.
    fn tensor<E: serde::de::Error>(
        &self,
        dtype: Option<Dtype>,
        shape: Option<Vec<usize>>,
        offsets: Option<Vec<usize>>,
    ) -> Result<TensorInfo, E> {
        let missing = |field: &str| self.faults.fail(self.item(field), "one", "none");
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;
        let Some(expected) = dtype.tensor_bytes(&shape) else {
            let found = format!("{shape:?}, more bytes of {dtype} than can be counted");
            return Err(self.faults.fail(self.item("shape"), "a size that fits into memory", found));
        };
        let &[start, end] = &offsets[..] else {
            let found = format!("{} numbers", offsets.len());
            return Err(self.faults.fail(self.item("data_offsets"), "a start and an end", found));
        };
        if end.checked_sub(start) != Some(expected) {
            return Err(self.faults.fail(
                self.item("data_offsets"),
                format!("{expected} bytes for {dtype} {shape:?}"),
                format!("{start} to {end}"),
            ));
        }
        Ok(TensorInfo { dtype, shape, shard: 0, range: Range { start, end } })
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = TensorInfo;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TensorInfo, A::Error> {
        let faults = self.faults;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key::<String>()? {
            let item = || self.item(&field);
            let again = match field.as_str() {
                "dtype" => {
                    let name =
                        map.next_value::<String>().map_err(faults.about(item, "the name of a type"))?;
                    dtype.replace(self.dtype(&name)?).is_some()
                }
                "shape" => {
                    let numbers = Numbers { faults, most: MAX_RANK, item: &item };
                    let numbers = map.next_value_seed(numbers);
                    let expected = "an array of sizes, each zero or more";
                    shape.replace(numbers.map_err(faults.about(item, expected))?).is_some()
                }
                "data_offsets" => {
                    let numbers = map.next_value_seed(Numbers { faults, most: 2, item: &item });
                    let expected = "a start and an end, each zero or more";
                    offsets.replace(numbers.map_err(faults.about(item, expected))?).is_some()
                }
                _ => {
                    let found = quoted(&field);
                    return Err(faults.fail(quoted(self.name), "only dtype, shape and data_offsets", found));
                }
            };
            if again {
                return Err(faults.fail(item(), "one", "a second one"));
            }
        }
        self.tensor(dtype, shape, offsets)
    }
}

/// Reads an array of at most `most` sizes.
struct Numbers<'a> {
    faults: &'a Faults,
    most: usize,
    item: &'a dyn Fn() -> String,
}

seed!(Numbers -> Vec<usize>, deserialize_seq);

impl<'de> Visitor<'de> for Numbers<'_> {
    type Value = Vec<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<usize>, A::Error> {
        let mut numbers = Vec::new();
        while let Some(number) = seq.next_element()? {
            if numbers.len() == self.most {
                let expected = format!("at most {} numbers", self.most);
                return Err(self.faults.fail((self.item)(), expected, "more"));
            }
            numbers.push(number);
        }
        Ok(numbers)
    }
}
