//! Typed metadata of a GGUF file.

use super::cursor::Cursor;
use crate::error::Result;

/// A metadata value, in the type the file stores.
#[derive(Clone, PartialEq, Debug)]
#[allow(missing_docs)] // the names are the types
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    Text(String),
    Array(Array),
}

/// An array of one type. The format also has arrays of arrays; no known file uses them and they are refused.
#[derive(Clone, PartialEq, Debug)]
#[allow(missing_docs)] // the names are the types
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    Text(Texts),
}

/// Many short texts, as a vocabulary has them, in two allocations.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Texts {
    text: String,
    ends: Vec<usize>,
}

impl Texts {
    /// Number of texts.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The text of that index.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        self.text.get(start..end)
    }

    /// All texts in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).filter_map(|index| self.get(index))
    }

    fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }
}

impl Value {
    /// A non-negative integer of any stored type.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            _ => self.as_i64().and_then(|value| value.try_into().ok()),
        }
    }

    /// An integer of any stored type that fits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::I8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::I16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::I32(value) => Some(value.into()),
            Self::U64(value) => value.try_into().ok(),
            Self::I64(value) => Some(value),
            _ => None,
        }
    }

    /// A number of any stored type.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            Self::U64(value) => Some(value as f64),
            _ => self.as_i64().map(|value| value as f64),
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = *self { Some(value) } else { None }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(array) = self { Some(array) } else { None }
    }

    /// An array of texts.
    pub fn as_texts(&self) -> Option<&Texts> {
        if let Self::Array(Array::Text(texts)) = self { Some(texts) } else { None }
    }

    /// The type's name, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::Bool(_) => "a truth value",
            Self::Text(_) => "a text",
            Self::Array(_) => "an array",
        }
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::I8(values) => values.len(),
            Self::U16(values) => values.len(),
            Self::I16(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::U64(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::Text(texts) => texts.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element of that index as a value of its own.
    pub fn get(&self, index: usize) -> Option<Value> {
        Some(match self {
            Self::U8(values) => Value::U8(*values.get(index)?),
            Self::I8(values) => Value::I8(*values.get(index)?),
            Self::U16(values) => Value::U16(*values.get(index)?),
            Self::I16(values) => Value::I16(*values.get(index)?),
            Self::U32(values) => Value::U32(*values.get(index)?),
            Self::I32(values) => Value::I32(*values.get(index)?),
            Self::U64(values) => Value::U64(*values.get(index)?),
            Self::I64(values) => Value::I64(*values.get(index)?),
            Self::F32(values) => Value::F32(*values.get(index)?),
            Self::F64(values) => Value::F64(*values.get(index)?),
            Self::Bool(values) => Value::Bool(*values.get(index)?),
            Self::Text(texts) => Value::Text(texts.get(index)?.into()),
        })
    }

    /// All elements, each as a value of its own.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        (0..self.len()).filter_map(|index| self.get(index))
    }
}

/// Codes of the types in a file.
const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

/// Reads a type code and a value of that type.
pub(super) fn read(cursor: &mut Cursor<'_>, item: &dyn Fn() -> String) -> Result<Value> {
    let code = cursor.u32(&|| format!("{}: type", item()))?;
    if code == ARRAY {
        return Ok(Value::Array(read_array(cursor, item)?));
    }
    if code == TEXT {
        return Ok(Value::Text(cursor.text(item)?.into()));
    }
    // A number is an array of one.
    let array = numbers(cursor, code, Some(1), item)?;
    Ok(array.get(0).expect("one number was read"))
}

fn read_array(cursor: &mut Cursor<'_>, item: &dyn Fn() -> String) -> Result<Array> {
    let code = cursor.u32(&|| format!("{}: element type", item()))?;
    match code {
        ARRAY => Err(cursor.wrong(item(), "an array of numbers or texts", "an array of arrays")),
        TEXT => {
            let count = cursor.count(8, &|| format!("{}: array length", item()))?; // a length each, at least
            let mut texts = Texts { text: String::new(), ends: Vec::with_capacity(count) };
            for index in 0..count {
                texts.push(cursor.text(&|| format!("{}[{index}]", item()))?);
            }
            Ok(Array::Text(texts))
        }
        _ => numbers(cursor, code, None, item),
    }
}

/// Reads `count` numbers of a type; without a count it stands in front of them.
fn numbers(
    cursor: &mut Cursor<'_>,
    code: u32,
    count: Option<usize>,
    item: &dyn Fn() -> String,
) -> Result<Array> {
    let width = match code {
        U8 | I8 | BOOL => 1,
        U16 | I16 => 2,
        U32 | I32 | F32 => 4,
        U64 | I64 | F64 => 8,
        _ => return Err(cursor.wrong(item(), "a value type from 0 to 12", code.to_string())),
    };
    let count = match count {
        Some(count) => count,
        None => cursor.count(width, &|| format!("{}: array length", item()))?,
    };
    let bytes = cursor.take(count * width, item)?; // fits: a count is at most the bytes left over the width
    Ok(match code {
        U8 => Array::U8(bytes.to_vec()),
        I8 => Array::I8(bytes.iter().map(|&byte| byte as i8).collect()),
        U16 => Array::U16(decode(bytes, u16::from_le_bytes)),
        I16 => Array::I16(decode(bytes, i16::from_le_bytes)),
        U32 => Array::U32(decode(bytes, u32::from_le_bytes)),
        I32 => Array::I32(decode(bytes, i32::from_le_bytes)),
        F32 => Array::F32(decode(bytes, f32::from_le_bytes)),
        U64 => Array::U64(decode(bytes, u64::from_le_bytes)),
        I64 => Array::I64(decode(bytes, i64::from_le_bytes)),
        F64 => Array::F64(decode(bytes, f64::from_le_bytes)),
        _ => {
            if let Some(odd) = bytes.iter().find(|&&byte| byte > 1) {
                return Err(cursor.wrong(item(), "a truth value of 0 or 1", odd.to_string()));
            }
            Array::Bool(bytes.iter().map(|&byte| byte == 1).collect())
        }
    })
}

fn decode<const N: usize, T>(bytes: &[u8], number: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|chunk| number(*chunk)).collect()
}
