//! The `nybble` section of a configuration: how a model is to be run, beyond what other programs know.
//!
//! ```text
//! "nybble": {"version": 1, "created_by": "nybble 0.1.0", "run": {"softmax": "log2", "tokens": {"ratio": 0.3}}}
//! ```
//!
//! A key of `run` that is not known here changes results in a way that cannot be guessed, so it is refused by name.

use serde_json::{Map, Value};

use super::config::brief;
use crate::error::{Error, Result};
use crate::tokens::Policy;

const FILE: &str = "config.json: nybble";

/// The newest version of the section that is read.
const VERSION: u64 = 1;

/// How a model is run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// Softmax outputs are powers of two with 4-bit exponents.
    pub log2_softmax: bool,
    /// Attention of image encoders multiplies codes of 7 bits, not floats.
    pub attention_codes: bool,
    /// Which tokens of prompts are reduced.
    pub tokens: Option<Policy>,
    /// Whether thresholds of activation sparsity stand beside the weights, see [`super::sparsity`].
    pub sparse: bool,
}

impl Settings {
    /// Reads the section of a configuration; all defaults where there is none.
    pub fn read(config: &Value) -> Result<Self> {
        let section = match config.get("nybble") {
            None | Some(Value::Null) => return Ok(Self::default()),
            Some(Value::Object(section)) => section,
            Some(other) => return Err(Error::format(FILE, "section", "an object", brief(other))),
        };
        match section.get("version").map(Value::as_u64) {
            Some(Some(1..=VERSION)) => {}
            found => {
                let found = found.flatten().map_or("no whole number".into(), |n| n.to_string());
                return Err(Error::unsupported(
                    format!("{FILE}: version {found}"),
                    format!("{VERSION} is read; a newer nybble may have made the folder"),
                ));
            }
        }
        let mut settings = Self::default();
        let nothing = Map::new();
        let run = match section.get("run") {
            None | Some(Value::Null) => &nothing,
            Some(Value::Object(run)) => run,
            Some(other) => return Err(Error::format(FILE, "run", "an object", brief(other))),
        };
        for (key, value) in run {
            match (key.as_str(), value.as_str()) {
                ("softmax", Some("exact")) => settings.log2_softmax = false,
                ("softmax", Some("log2")) => settings.log2_softmax = true,
                ("softmax", _) => {
                    return Err(Error::format(FILE, "run.softmax", "\"exact\" or \"log2\"", brief(value)));
                }
                ("attention", _) => settings.attention_codes = attention_codes(value)?,
                ("sparsity", _) if value.is_null() => settings.sparse = false,
                // How the thresholds were found is told for people; the file has them.
                ("sparsity", _) if value.is_object() => settings.sparse = true,
                ("sparsity", _) => {
                    return Err(Error::format(FILE, "run.sparsity", "an object", brief(value)));
                }
                ("tokens", _) if value.is_null() => settings.tokens = None,
                ("tokens", _) => {
                    let policy = Policy::read(value).map_err(|error| match error {
                        Error::Argument { name, expected, found } => {
                            Error::format(FILE, format!("run.{name}"), expected, found)
                        }
                        Error::Unsupported { item, detail } => {
                            let detail = format!("{detail}; a newer nybble may have made the folder");
                            Error::unsupported(format!("{FILE}: run.{item}"), detail)
                        }
                        error => error,
                    })?;
                    settings.tokens = Some(policy);
                }
                _ => {
                    let detail = "attention, softmax, tokens and sparsity are read; a newer nybble may have made the folder";
                    return Err(Error::unsupported(format!("{FILE}: run.{key}"), detail));
                }
            }
        }
        if settings.attention_codes && settings.log2_softmax {
            let detail = "its weights are powers of two";
            return Err(Error::unsupported(
                format!("{FILE}: run.attention.bits 7 with run.softmax \"log2\""),
                detail,
            ));
        }
        Ok(settings)
    }
}

/// Reads `{"bits": 7}`.
fn attention_codes(value: &Value) -> Result<bool> {
    let section = match value {
        Value::Null => return Ok(false),
        Value::Object(section) => section,
        other => return Err(Error::format(FILE, "run.attention", "an object", brief(other))),
    };
    if let Some(key) = section.keys().find(|key| *key != "bits") {
        let detail = "bits is read; a newer nybble may have made the folder";
        return Err(Error::unsupported(format!("{FILE}: run.attention.{key}"), detail));
    }
    match section.get("bits").map(|bits| (bits.as_u64(), bits)) {
        Some((Some(7), _)) => Ok(true),
        found => {
            let found = found.map_or("nothing".into(), |(_, bits)| brief(bits));
            Err(Error::format(FILE, "run.attention.bits", "7", found))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sections_are_read_strictly() {
        let read = |section: Value| Settings::read(&json!({"nybble": section}));
        assert_eq!(Settings::read(&json!({})).expect("none"), Settings::default());
        assert_eq!(read(Value::Null).expect("none"), Settings::default());
        assert_eq!(read(json!({"version": 1, "created_by": "x"})).expect("good"), Settings::default());
        assert!(read(json!({"version": 1, "run": {"softmax": "log2"}})).expect("good").log2_softmax);
        let attention = json!({"version": 1, "run": {"attention": {"bits": 7}}});
        assert!(read(attention).expect("good").attention_codes);
        let tokens = read(json!({"version": 1, "run": {"tokens": {"ratio": 0.3}}})).expect("good").tokens;
        assert_eq!(tokens, Some(Policy { ratio: 0.3, ..Policy::default() }));
        assert_eq!(read(json!({"version": 1, "run": {"tokens": null}})).expect("good"), Settings::default());
        for (section, word) in [
            (json!({"version": 1, "run": {"tokens": {"ratio": 1.0}}}), "run.tokens.ratio"),
            (json!({"version": 1, "run": {"tokens": {"rate": 0.1}}}), "newer"),
            (json!(3), "an object"),
            (json!({}), "version"),
            (json!({"version": 2}), "newer"),
            (json!({"version": 1, "run": []}), "run"),
            (json!({"version": 1, "run": {"softmax": 2}}), "softmax"),
            (json!({"version": 1, "run": {"attention": 7}}), "run.attention"),
            (json!({"version": 1, "run": {"attention": {}}}), "run.attention.bits"),
            (json!({"version": 1, "run": {"attention": {"bits": 8}}}), "run.attention.bits"),
            (json!({"version": 1, "run": {"attention": {"bits": 7, "rows": 4}}}), "run.attention.rows"),
            (json!({"version": 1, "run": {"attention": {"bits": 7}, "softmax": "log2"}}), "log2"),
            (json!({"version": 1, "run": {"sotfmax": "log2"}}), "sotfmax"),
        ] {
            let message = read(section).expect_err(word).to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
