//! Element types of tensors in files, and their conversion to `f32`.
//!
//! Plain types hold one value an element. The block types of GGUF (`Q4_0` to `Q6_K`) hold 32 or 256 neighbours of a row
//! together with their scales, so a row must be a whole number of blocks and an element has no address of its own. Both
//! kinds are described by the same two numbers: [`Dtype::block`] elements take [`Dtype::block_bytes`] bytes.

use std::fmt;

pub use super::blocks::dequantize;

/// The type of a tensor's elements as stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)] // the names are the formats' own
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Names of the types a safetensors file may have here.
pub(crate) const SAFETENSORS_NAMES: &str = "F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL";

/// Names of the types a GGUF file may have here.
pub(crate) const GGUF_NAMES: &str =
    "F32, F16, BF16, F64, I8, I16, I32, I64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K";

/// Types of the safetensors format that exist but are not read here.
const SAFETENSORS_OTHERS: [&str; 10] = [
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E4M3",
    "F8_E4M3FNUZ",
    "F8_E5M2",
    "F8_E5M2FNUZ",
    "F8_E8M0",
    "C64",
    "C128",
];

impl Dtype {
    /// All types.
    pub const ALL: [Self; 21] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::I64,
        Self::I32,
        Self::I16,
        Self::I8,
        Self::U64,
        Self::U32,
        Self::U16,
        Self::U8,
        Self::Bool,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The name the formats give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Elements that are stored together: 1 for plain types.
    pub fn block(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            _ => 1,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::Bool => 1,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Whether its values are real numbers that [`dequantize`] turns into `f32`.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16) || self.is_quantized()
    }

    /// Whether it is one of GGUF's block types.
    pub fn is_quantized(self) -> bool {
        self.block() > 1
    }

    /// Bytes of `cols` neighbouring elements of a row; none when they are not whole blocks or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block()) {
            return None;
        }
        (cols / self.block()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor whose last dimension is the contiguous one; none as for [`Dtype::row_bytes`]. A scalar (no
    /// dimensions) has one element.
    pub fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        // Counted as if no dimension were zero, so that the product of any of them fits, in any order.
        let bounded =
            shape.iter().try_fold(self.block_bytes(), |product, &dim| product.checked_mul(dim.max(1)))?;
        let cols = shape.last().copied().unwrap_or(1);
        let rows: usize = shape.split_last().map_or(1, |(_, rows)| rows.iter().product());
        let bytes = self.row_bytes(cols)?.checked_mul(rows)?;
        isize::try_from(bounded / self.block()).is_ok().then_some(bytes)
    }

    /// The type a safetensors header calls `name`, if it is read here.
    pub fn from_safetensors(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| !dtype.is_quantized() && dtype.name() == name)
    }

    /// Whether `name` is a type of the safetensors format that is not read here.
    pub(crate) fn is_other_safetensors(name: &str) -> bool {
        SAFETENSORS_OTHERS.contains(&name)
    }

    /// The type GGUF numbers `code`, if it is read here.
    pub fn from_ggml(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            24 => Self::I8,
            25 => Self::I16,
            26 => Self::I32,
            27 => Self::I64,
            28 => Self::F64,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// The name of a GGUF type that exists but is not read here.
    pub(crate) fn other_ggml_name(code: u32) -> Option<&'static str> {
        Some(match code {
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => return None,
        })
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
