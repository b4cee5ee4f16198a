//! Where a tensor lies in a file.

use std::ops::Range;

use super::dtype::Dtype;

/// Most tensors a file may name; far above any real one, far below what could exhaust memory.
pub const MAX_TENSORS: usize = 1 << 18;

/// Longest tensor name in bytes.
pub const MAX_NAME: usize = 512;

/// One tensor of an open file or folder. Its size and place were compared with the file when it was opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Dimensions, the last one contiguous (row-major). Empty for a scalar.
    pub shape: Vec<usize>,
    /// Index of the file in a folder.
    pub(crate) shard: usize,
    /// Place in that file.
    pub(crate) range: Range<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product() // fits: checked when the file was opened
    }

    /// Bytes in the file.
    pub fn byte_len(&self) -> usize {
        self.range.len()
    }

    /// Length of the contiguous dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of contiguous rows: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rows)| rows.iter().product())
    }
}

/// What is wrong with `name` as a tensor name: (expected, found), if anything is.
pub(crate) fn name_fault(name: &str) -> Option<(String, String)> {
    if name.is_empty() {
        return Some(("a name".into(), "an empty one".into()));
    }
    if name.len() > MAX_NAME {
        return Some((format!("a name of at most {MAX_NAME} bytes"), format!("{} bytes", name.len())));
    }
    let bad = name.chars().find(|c| c.is_control())?;
    Some(("a name without control characters".into(), format!("{bad:?} in it")))
}

/// `text` in quotes with odd characters escaped, cut when long: file contents never flood or garble a message.
pub(crate) fn quoted(text: &str) -> String {
    const LONGEST: usize = 96;
    match text.char_indices().nth(LONGEST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}... ({} bytes)", &text[..end], text.len()),
    }
}
