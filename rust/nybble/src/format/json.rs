//! JSON files with limits.
//!
//! A JSON text of a few bytes a value becomes tens of bytes a value in memory, nests as deeply as the stack allows, and may
//! say a key twice and mean neither. So reading has four caps: bytes of the file, depth, memory of the result, and one value
//! a key.

use std::cell::Cell;
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::foreign::refuse_foreign;
use super::mapped::{open_regular, read_all};
use super::strict::Faults;
use super::tensor::quoted;
use crate::error::{Error, Result};

/// Size cap for `config.json` and its like.
pub const CONFIG_BYTES: usize = 16 << 20;

/// Size cap for shard indexes and tokenizers.
pub const TABLE_BYTES: usize = 256 << 20;

/// Arrays and objects may be nested this deeply.
pub const MAX_DEPTH: usize = 64;

/// Memory that any text may take once parsed; larger texts may take [`EXPANSION`] times their size.
const LEAST_MEMORY: usize = 48 << 20;
const EXPANSION: usize = 8;

/// Reads a JSON file of at most `max_bytes`.
pub fn read(path: impl AsRef<Path>, max_bytes: usize) -> Result<Value> {
    let path = path.as_ref();
    parse(path, &read_text(path, max_bytes)?)
}

/// Parses a JSON text; `path` is the name used in messages.
pub fn parse(path: impl AsRef<Path>, text: &[u8]) -> Result<Value> {
    let memory = text.len().saturating_mul(EXPANSION).max(LEAST_MEMORY);
    Faults::read(path.as_ref(), "text", text, |faults, json| {
        let limits = Limits { faults, memory: Cell::new(memory) };
        AnyValue { limits: &limits, depth: 0, key: None }.deserialize(json)
    })
}

/// The bytes of a JSON file of at most `max_bytes`.
pub(crate) fn read_text(path: &Path, max_bytes: usize) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let len = file.metadata().map_err(Error::io(path))?.len();
    if len > max_bytes as u64 {
        return Err(Error::format(
            path,
            "size",
            format!("at most {max_bytes} bytes"),
            format!("{len} bytes"),
        ));
    }
    let text = read_all(path, file, len)?;
    refuse_foreign(path, &text, "JSON text")?;
    Ok(text)
}

struct Limits<'a> {
    faults: &'a Faults,
    /// Bytes that may still be taken; an estimate on the safe side.
    memory: Cell<usize>,
}

impl Limits<'_> {
    fn take<E: serde::de::Error>(&self, bytes: usize) -> Result<(), E> {
        match self.memory.get().checked_sub(bytes) {
            Some(left) => {
                self.memory.set(left);
                Ok(())
            }
            None => Err(self.faults.fail(
                "text",
                "fewer values",
                "so many that they would take far more memory than the text",
            )),
        }
    }
}

/// Reads any value at some depth.
#[derive(Clone, Copy)]
struct AnyValue<'a> {
    limits: &'a Limits<'a>,
    depth: usize,
    /// The nearest key above, for messages.
    key: Option<&'a str>,
}

impl AnyValue<'_> {
    fn nested<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.depth < MAX_DEPTH {
            return Ok(());
        }
        let item = self.key.map_or_else(|| "text".into(), quoted);
        Err(self.limits.faults.fail(item, format!("at most {MAX_DEPTH} levels of nesting"), "more"))
    }
}

impl<'de> DeserializeSeed<'de> for AnyValue<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Value, D::Error> {
        // A value and its place in a vector that doubles.
        self.limits.take(2 * size_of::<Value>())?;
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyValue<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number that is not finite"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.limits.take(value.len() + 16)?;
        Ok(Value::String(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        self.nested()?;
        let mut values = Vec::new();
        let inner = Self { depth: self.depth + 1, ..self };
        while let Some(value) = seq.next_element_seed(inner)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.nested()?;
        self.limits.take(256)?; // the tables of a small map
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.limits.take(key.len() + 128)?;
            if values.contains_key(&key) {
                return Err(self.limits.faults.fail(quoted(&key), "each key once", "a second one"));
            }
            let value = map.next_value_seed(AnyValue {
                limits: self.limits,
                depth: self.depth + 1,
                key: Some(&key),
            })?;
            values.insert(key, value);
        }
        Ok(Value::Object(values))
    }
}
