//! Reading JSON with errors that name the key.
//!
//! `serde` lets a visitor refuse what it sees, but its error is only a text. [`Faults`] carries the structured half (which
//! item, what was expected, what was found) beside it; the first one recorded is the innermost and wins.

use std::cell::RefCell;
use std::fmt::Display;
use std::path::Path;

use serde_json::de::SliceRead;

use super::tensor::quoted;
use crate::error::{Error, Result};

/// The deserializer all JSON of this module comes through.
pub(crate) type Json<'a> = serde_json::Deserializer<SliceRead<'a>>;

enum Fault {
    Wrong { item: String, expected: String, found: String },
    Unsupported { item: String, detail: String },
}

/// The first thing found wrong, if anything was.
pub(crate) struct Faults {
    first: RefCell<Option<Fault>>,
}

impl Faults {
    /// Reads one JSON text completely with `read`; `item` is what messages call the whole of it.
    pub(crate) fn read<'a, T>(
        path: &Path,
        item: &str,
        text: &'a [u8],
        read: impl FnOnce(&Self, &mut Json<'a>) -> Result<T, serde_json::Error>,
    ) -> Result<T> {
        let faults = Self { first: RefCell::new(None) };
        let mut json = serde_json::Deserializer::from_slice(text);
        let outcome = read(&faults, &mut json).and_then(|value| json.end().map(|()| value));
        outcome.map_err(|error| match faults.first.into_inner() {
            Some(Fault::Unsupported { item, detail }) => {
                Error::unsupported(format!("{}: {item}", path.display()), detail)
            }
            Some(Fault::Wrong { item, expected, found }) => {
                let place = if found.contains(" at line ") || error.line() == 0 {
                    String::new()
                } else {
                    format!(" at line {} column {}", error.line(), error.column())
                };
                Error::format(path, item, expected, found + &place)
            }
            None => Error::format(path, item, "valid JSON", clip(&error)),
        })
    }

    /// Records a fault and returns the error that stops the reading.
    pub(crate) fn fail<E: serde::de::Error>(
        &self,
        item: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> E {
        self.record(Fault::Wrong { item: item.into(), expected: expected.into(), found: found.into() })
    }

    /// As [`Faults::fail`], for something well formed that is not read here.
    pub(crate) fn unsupported<E: serde::de::Error>(&self, item: String, detail: String) -> E {
        self.record(Fault::Unsupported { item, detail })
    }

    fn record<E: serde::de::Error>(&self, fault: Fault) -> E {
        self.first.borrow_mut().get_or_insert(fault);
        E::custom("refused")
    }

    /// Gives an error of `serde` the item it is about, unless a deeper one has been recorded.
    pub(crate) fn about<E: serde::de::Error>(
        &self,
        item: impl FnOnce() -> String,
        expected: &str,
    ) -> impl FnOnce(E) -> E {
        move |error| {
            if self.first.borrow().is_some() {
                return error;
            }
            self.fail(item(), expected, clip(&error))
        }
    }
}

/// The text of an error of `serde`, which may quote the file at any length.
fn clip(error: &impl Display) -> String {
    let text = error.to_string();
    if text.len() <= 160 { text } else { quoted(&text) }
}
