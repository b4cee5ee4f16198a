//! Reading `config.json` so that every problem is found, not only the first.
//!
//! A [`Reader`] hands out values; a missing or impossible one is noted and replaced by a harmless stand-in, so the family's
//! code runs on to the end and [`Reader::finish`] reports all of it at once.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest size any key may have; real ones stay far below, and a product of two fits into 64 bits.
const MAX_SIZE: u64 = 1 << 31;

/// The values of one configuration and what is wrong with them.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    /// A reader of `config`, which must be an object.
    pub(crate) fn new(config: &'a Value) -> Result<Self> {
        match config {
            Value::Object(map) => Ok(Self { map, problems: Vec::new() }),
            other => Err(Error::Config {
                file: "config.json".into(),
                problems: vec![format!("expected an object, found {}", brief(other))],
            }),
        }
    }

    /// The value of `key`; JSON's null counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Notes a problem.
    pub(crate) fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }

    /// A positive whole number that must be there.
    pub(crate) fn size(&mut self, key: &str) -> usize {
        self.opt_size(key).unwrap_or_else(|| {
            if self.get(key).is_none() {
                self.problem(format!("{key}: expected a positive whole number, found nothing"));
            }
            1
        })
    }

    /// A positive whole number, or `default`.
    pub(crate) fn size_or(&mut self, key: &str, default: usize) -> usize {
        self.opt_size(key).unwrap_or(default)
    }

    /// A positive whole number, if the key is there and good.
    pub(crate) fn opt_size(&mut self, key: &str) -> Option<usize> {
        self.at_least(key, 1)
    }

    /// A whole number, 0 or more, if the key is there and good.
    pub(crate) fn count(&mut self, key: &str) -> Option<usize> {
        self.at_least(key, 0)
    }

    fn at_least(&mut self, key: &str, least: u64) -> Option<usize> {
        let value = self.get(key)?;
        let range = least..=MAX_SIZE;
        let size = whole(value).filter(|n| range.contains(n)).and_then(|n| usize::try_from(n).ok());
        if size.is_none() {
            self.problem(format!(
                "{key}: expected a whole number from {least} to {MAX_SIZE}, found {}",
                brief(value)
            ));
        }
        size
    }

    /// A positive finite number, or `default`.
    pub(crate) fn number_or(&mut self, key: &str, default: f64) -> f64 {
        self.opt_number(key).unwrap_or(default)
    }

    /// A positive finite number, if the key is there and good.
    pub(crate) fn opt_number(&mut self, key: &str) -> Option<f64> {
        let value = self.get(key)?;
        let number = value.as_f64().filter(|n| *n > 0.0 && (*n as f32).is_finite());
        if number.is_none() {
            self.problem(format!("{key}: expected a positive number, found {}", brief(value)));
        }
        number
    }

    /// A truth value, or `default`.
    pub(crate) fn flag_or(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                self.problem(format!("{key}: expected true or false, found {}", brief(other)));
                default
            }
        }
    }

    /// A text, or `default`.
    pub(crate) fn text_or(&mut self, key: &str, default: &'a str) -> &'a str {
        match self.get(key) {
            None => default,
            Some(Value::String(text)) => text,
            Some(other) => {
                self.problem(format!("{key}: expected a text, found {}", brief(other)));
                default
            }
        }
    }

    /// The number of layers under `key`, within [`super::spec::MAX_LAYERS`].
    pub(crate) fn layers(&mut self, key: &str) -> usize {
        let layers = self.size(key);
        if layers <= super::spec::MAX_LAYERS {
            return layers;
        }
        self.problem(format!("{key}: expected at most {}, found {layers}", super::spec::MAX_LAYERS));
        1
    }

    /// Notes a problem when `inner` does not divide `outer`.
    pub(crate) fn divides(&mut self, outer: (&str, usize), inner: (&str, usize)) {
        if !outer.1.is_multiple_of(inner.1) {
            self.problem(format!(
                "{}: expected a multiple of {} = {}, found {}",
                outer.0, inner.0, inner.1, outer.1
            ));
        }
    }

    /// A reader of an object inside this one, with an empty list of problems; see [`Reader::absorb`].
    pub(crate) fn inner(map: &'a Map<String, Value>) -> Self {
        Self { map, problems: Vec::new() }
    }

    /// Takes over the problems of an inner reader, each with the key it was found under.
    pub(crate) fn absorb(&mut self, key: &str, inner: Self) {
        self.problems.extend(inner.problems.into_iter().map(|problem| format!("{key}.{problem}")));
    }

    /// `value`, or all problems.
    pub(crate) fn finish<T>(self, value: T) -> Result<T> {
        if self.problems.is_empty() {
            return Ok(value);
        }
        Err(Error::Config { file: "config.json".into(), problems: self.problems })
    }
}

/// A whole number, also when written as `4096.0`.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        (number.fract() == 0.0 && (0.0..=9e15).contains(&number)).then_some(number as u64)
    })
}

/// A value as a message shows it: cut, since it may be megabytes.
pub(crate) fn brief(value: &Value) -> String {
    let mut text = match value {
        Value::Array(list) => return format!("a list of {}", list.len()),
        Value::Object(map) => return format!("an object of {}", map.len()),
        other => other.to_string(),
    };
    if text.chars().count() > 60 {
        text = text.chars().take(60).chain("...".chars()).collect();
    }
    text
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these values are exact")]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_problem_is_reported() {
        let config =
            json!({"a": -1, "b": 1e30, "c": "x", "d": [1], "e": 4096.0, "f": null, "g": 0.5, "h": true});
        let mut reader = Reader::new(&config).expect("an object");
        assert_eq!(reader.size("e"), 4096);
        assert_eq!(reader.size_or("f", 7), 7);
        assert_eq!(reader.number_or("g", 1.0), 0.5);
        assert!(reader.flag_or("h", false));
        for key in ["a", "b", "c", "d", "missing"] {
            assert_eq!(reader.size(key), 1);
        }
        assert!(!reader.flag_or("c", false));
        assert_eq!(reader.text_or("a", "fallback"), "fallback");
        assert_eq!(reader.number_or("a", 2.0), 2.0);
        let error = reader.finish(()).expect_err("eight problems");
        let Error::Config { problems, .. } = error else { panic!("a config error") };
        assert_eq!(problems.len(), 8, "{problems:?}");
        assert!(problems[4].contains("missing"), "{problems:?}");
    }

    #[test]
    fn a_config_that_is_no_object_is_an_error() {
        assert!(Reader::new(&json!([1, 2])).is_err());
    }
}
