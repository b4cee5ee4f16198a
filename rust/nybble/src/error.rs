//! The one error type of the core crate.
//!
//! Every variant says which file, tensor or argument is wrong, what was expected there and what was found, so a message
//! can be acted on without a debugger. The Python binding maps each variant to one exception class.

use std::path::{Path, PathBuf};

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to open, read, map, write or rename something.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file's bytes are damaged, hostile, or of a kind that is not read here.
    #[error("{file}: {item}: expected {expected}, found {found}")]
    Format {
        /// The file's path.
        file: String,
        /// The tensor, key or field.
        item: String,
        /// What a good file has there.
        expected: String,
        /// What this file has there.
        found: String,
    },
    /// A configuration contradicts itself or the tensors beside it; every problem found is listed.
    #[error("{file}: {}", problems.join("; "))]
    Config {
        /// The configuration's path.
        file: String,
        /// One sentence each: key, expected, found.
        problems: Vec<String>,
    },
    /// A well-formed request for something this version does not do.
    #[error("{item} is not supported: {detail}")]
    Unsupported {
        /// The architecture, data type or feature.
        item: String,
        /// What is supported instead.
        detail: String,
    },
    /// A caller's argument is out of its range.
    #[error("{name}: expected {expected}, found {found}")]
    Argument {
        /// The argument.
        name: String,
        /// What is accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A token id is not in the model's vocabulary.
    #[error("token id {token} at position {position} is outside the vocabulary of {vocab}")]
    Token {
        /// The id.
        token: u32,
        /// Its index in the request.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The tokens do not fit into the model's context.
    #[error(
        "{tokens} tokens do not fit into the context of {limit}: shorten the prompt or ask for fewer new tokens"
    )]
    Context {
        /// Tokens the request needs.
        tokens: usize,
        /// Tokens the model can hold.
        limit: usize,
    },
    /// Packed weights were handed to a kernel of another layout.
    #[error("packed weights have layout {found}, this kernel reads {expected}")]
    Layout {
        /// The layout the kernel reads.
        expected: &'static str,
        /// The layout of the data.
        found: &'static str,
    },
    /// The caller asked to stop (Ctrl-C).
    #[error("interrupted")]
    Interrupted,
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an [`std::io::Error`] with the path it is about.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// A [`Error::Format`] about `item` in `file`.
    pub fn format(
        file: impl AsRef<Path>,
        item: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Format {
            file: file.as_ref().display().to_string(),
            item: item.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// A [`Error::Argument`] about `name`.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "numbers and fresh strings read better without a borrow"
    )]
    pub fn argument(name: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Argument { name: name.into(), expected: expected.into(), found: found.to_string() }
    }

    /// A [`Error::Unsupported`] about `item`.
    pub fn unsupported(item: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Unsupported { item: item.into(), detail: detail.into() }
    }
}
