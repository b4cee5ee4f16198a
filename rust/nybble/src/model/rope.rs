//! Rotary position embedding: frequencies, their scalings, and the tables of angles.
//!
//! Pair `i` of a head turns by `position * theta^(-2i/d)`. Models stretched to longer contexts scale these frequencies:
//! `linear` divides all of them, `llama3` only the slow ones, `yarn` blends by wavelength and sharpens the attention,
//! `longrope` has one divisor a pair.
//!
//! A [`RopeTable`] holds the cosines and sines of the positions used so far and no more, so a configuration that promises
//! a context of billions costs nothing.

use serde_json::{Map, Value};

use super::config::{Reader, brief};

/// Positions a table grows by.
const STEP: usize = 256;

/// One rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Columns of a head that are rotated.
    pub dim: usize,
    /// The base of the frequencies.
    pub theta: f64,
    /// How they are changed for long contexts.
    pub scaling: Scaling,
}

/// The published ways to stretch a context.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// None.
    Default,
    /// All frequencies divided.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Wavelengths above `original / low` divided, below `original / high` kept, blended between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Sets the longest blended wavelength.
        low: f64,
        /// Sets the shortest blended wavelength.
        high: f64,
        /// Context of the training.
        original: f64,
    },
    /// Blended by the number of turns within the original context; cosines and sines scaled by `attention`.
    Yarn {
        /// The divisor of slow frequencies.
        factor: f64,
        /// Context of the training.
        original: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// Whether the blend's ends are rounded outwards to whole pairs.
        truncate: bool,
        /// Factor on cosines and sines.
        attention: f64,
    },
    /// One divisor a pair.
    Factors {
        /// The divisors.
        factors: Vec<f32>,
        /// Factor on cosines and sines.
        attention: f64,
    },
}

impl RopeSpec {
    /// Inverse frequencies of the pairs, and the factor on cosines and sines.
    ///
    /// The frequencies are computed in `f32` from the exponent on, as the models were trained: at far positions the
    /// rounding of a frequency is visible in the angle.
    #[expect(clippy::float_cmp, reason = "the published formula compares exactly")]
    pub fn frequencies(&self) -> (Vec<f32>, f32) {
        let theta = self.theta as f32;
        let pairs = self.dim / 2;
        let power = |i: usize| theta.powf((2 * i) as f32 / self.dim as f32);
        let plain = (0..pairs).map(|i| 1.0 / power(i));
        match &self.scaling {
            Scaling::Default => (plain.collect(), 1.0),
            Scaling::Linear { factor } => (plain.map(|f| f / *factor as f32).collect(), 1.0),
            Scaling::Llama3 { factor, low, high, original } => {
                let scaled = plain.map(|f| {
                    let wavelength = std::f32::consts::TAU / f;
                    if wavelength > (original / low) as f32 {
                        f / *factor as f32
                    } else if wavelength < (original / high) as f32 {
                        f
                    } else {
                        let smooth = (*original as f32 / wavelength - *low as f32) / (high - low) as f32;
                        (1.0 - smooth) * f / *factor as f32 + smooth * f
                    }
                });
                (scaled.collect(), 1.0)
            }
            Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention } => {
                let pair_of = |turns: f64| {
                    self.dim as f64 * (original / (turns * std::f64::consts::TAU)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(self.dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blended = plain.enumerate().map(|(i, f)| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    1.0 / (*factor as f32 * power(i)) * ramp + f * (1.0 - ramp)
                });
                (blended.collect(), *attention as f32)
            }
            Scaling::Factors { factors, attention } => {
                let scaled = factors.iter().enumerate().map(|(i, factor)| 1.0 / (factor * power(i)));
                (scaled.collect(), *attention as f32)
            }
        }
    }

    /// Reads rotary parameters from a configuration: `rope_parameters` of transformers 5 (for `layer_type` when it is kept
    /// by layer type), or the older `rope_scaling` beside `rope_theta`.
    pub(crate) fn read(
        config: &mut Reader<'_>,
        layer_type: Option<&str>,
        theta_key: &str,
        default_theta: f64,
        dim: usize,
        context: usize,
    ) -> Self {
        let theta = config.number_or(theta_key, default_theta);
        let mut spec = Self { dim, theta, scaling: Scaling::Default };
        let key = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let Some(mut value) = config.get(key) else { return spec };
        if let Some(of_type) = layer_type.and_then(|name| value.get(name)) {
            value = of_type;
            if value.is_null() {
                return spec;
            }
        } else if layer_type == Some("sliding_attention") {
            return spec; // one dictionary describes the layers with full attention only
        }
        let Value::Object(map) = value else {
            config.problem(format!("{key}: expected an object, found {}", brief(value)));
            return spec;
        };
        let mut inner = Reader::inner(map);
        spec.read_scaling(&mut inner, map, context);
        config.absorb(key, inner);
        spec
    }

    #[expect(clippy::float_cmp, reason = "a factor of exactly 1 is none")]
    fn read_scaling(&mut self, config: &mut Reader<'_>, map: &Map<String, Value>, context: usize) {
        self.theta = config.number_or("rope_theta", self.theta);
        let fallback = config.text_or("type", "default");
        let kind = config.text_or("rope_type", fallback);
        if config.opt_number("partial_rotary_factor").is_some_and(|factor| factor != 1.0) {
            config.problem("partial_rotary_factor: expected 1 for this family");
        }
        let original =
            |config: &mut Reader<'_>| config.number_or("original_max_position_embeddings", context as f64);
        self.scaling = match kind {
            // Within the context it was trained for, dynamic scaling is the plain embedding.
            "default" | "dynamic" => Scaling::Default,
            "linear" => Scaling::Linear { factor: required(config, "factor") },
            "llama3" => {
                let (low, high) = (required(config, "low_freq_factor"), required(config, "high_freq_factor"));
                if high <= low {
                    config.problem(format!("high_freq_factor: expected more than {low}, found {high}"));
                }
                Scaling::Llama3 { factor: required(config, "factor"), low, high, original: original(config) }
            }
            "yarn" => {
                let original = original(config);
                let factor = config.number_or("factor", context as f64 / original);
                let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let inferred = match (config.opt_number("mscale"), config.opt_number("mscale_all_dim")) {
                    (Some(one), Some(all)) => scale(one) / scale(all),
                    _ => scale(1.0),
                };
                Scaling::Yarn {
                    factor,
                    original,
                    beta_fast: config.number_or("beta_fast", 32.0),
                    beta_slow: config.number_or("beta_slow", 1.0),
                    truncate: config.flag_or("truncate", true),
                    attention: config.number_or("attention_factor", inferred),
                }
            }
            "longrope" => {
                let original = original(config);
                let factor = config.number_or("factor", context as f64 / original);
                let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                let short = divisors(config, map, "short_factor", self.dim / 2);
                let long = divisors(config, map, "long_factor", self.dim / 2);
                // Switching from short to long in the middle of a text would leave the cached keys turned the old way.
                if short != long && context as f64 > original {
                    config.problem(
                        "short_factor: expected the same values as long_factor; switching between them is not supported",
                    );
                }
                Scaling::Factors { factors: short, attention: config.number_or("attention_factor", inferred) }
            }
            other => {
                config.problem(format!(
                    "rope_type: expected default, linear, dynamic, llama3, yarn or longrope, found {other:?}"
                ));
                Scaling::Default
            }
        };
    }
}

fn required(config: &mut Reader<'_>, key: &str) -> f64 {
    config.opt_number(key).unwrap_or_else(|| {
        if config.get(key).is_none() {
            config.problem(format!("{key}: expected a positive number, found nothing"));
        }
        1.0
    })
}

fn divisors(config: &mut Reader<'_>, map: &Map<String, Value>, key: &str, pairs: usize) -> Vec<f32> {
    let list = map.get(key).and_then(Value::as_array);
    let factors: Option<Vec<f32>> = list.filter(|list| list.len() == pairs).and_then(|list| {
        let good = |value: &Value| value.as_f64().map(|f| f as f32).filter(|f| f.is_finite() && *f > 0.0);
        list.iter().map(good).collect()
    });
    factors.unwrap_or_else(|| {
        config.problem(format!("{key}: expected {pairs} positive numbers"));
        Vec::new()
    })
}

/// Cosines and sines of the positions used so far.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    frequencies: Vec<f32>, // [pairs]
    attention: f32,
    cos: Vec<f32>, // [positions, pairs]
    sin: Vec<f32>, // [positions, pairs]
}

impl RopeTable {
    /// An empty table.
    pub(crate) fn new(spec: &RopeSpec) -> Self {
        let (frequencies, attention) = spec.frequencies();
        Self { frequencies, attention, cos: Vec::new(), sin: Vec::new() }
    }

    /// Makes positions `0..len` available.
    pub(crate) fn extend(&mut self, len: usize) {
        let pairs = self.frequencies.len();
        let have = self.cos.len() / pairs.max(1);
        if len <= have || pairs == 0 {
            return;
        }
        for position in have..len.next_multiple_of(STEP) {
            for frequency in &self.frequencies {
                // The angle is rounded to f32 as in training; its cosine and sine are then exact to the last bit.
                let angle = f64::from(position as f32 * frequency);
                self.cos.push(angle.cos() as f32 * self.attention);
                self.sin.push(angle.sin() as f32 * self.attention);
            }
        }
    }

    /// Cosines and sines `[pairs]` of a position below what [`RopeTable::extend`] was given.
    pub(crate) fn angles(&self, position: usize) -> (&[f32], &[f32]) {
        let pairs = self.frequencies.len();
        let range = position * pairs..(position + 1) * pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these values are exact")]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: &Value, layer_type: Option<&str>) -> (RopeSpec, Vec<String>) {
        let mut reader = Reader::new(config).expect("an object");
        let spec = RopeSpec::read(&mut reader, layer_type, "rope_theta", 10_000.0, 8, 64);
        let problems = match reader.finish(()) {
            Ok(()) => vec![],
            Err(crate::Error::Config { problems, .. }) => problems,
            Err(other) => panic!("{other}"),
        };
        (spec, problems)
    }

    #[test]
    fn old_and_new_spellings_agree() {
        let old = json!({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}});
        let new = json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}});
        assert_eq!(read(&old, None), read(&new, None));
        let (spec, problems) = read(&old, None);
        assert!(problems.is_empty());
        assert_eq!(spec.frequencies().0[0], 0.25);
    }

    #[test]
    fn parameters_by_layer_type() {
        let config = json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}});
        assert_eq!(read(&config, Some("full_attention")).0.theta, 1e6);
        let sliding = read(&config, Some("sliding_attention")).0;
        assert_eq!((sliding.theta, sliding.scaling), (100.0, Scaling::Default));
        let old = json!({"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
        assert_eq!(read(&old, Some("sliding_attention")).0.scaling, Scaling::Default);
        assert_eq!(read(&old, Some("full_attention")).0.scaling, Scaling::Linear { factor: 8.0 });
    }

    #[test]
    fn unknown_and_incomplete_scalings_are_problems() {
        for (config, word) in [
            (json!({"rope_scaling": {"rope_type": "warp"}}), "warp"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "rope_scaling.factor"),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8}}), "low_freq_factor"),
            (
                json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": "x"}}),
                "short_factor",
            ),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": "NaN"}}), "factor"),
            (json!({"rope_scaling": 3}), "expected an object"),
            (json!({"rope_theta": -5}), "rope_theta"),
        ] {
            let problems = read(&config, None).1.join("; ");
            assert!(problems.contains(word), "{config}: {problems}");
        }
    }

    #[test]
    fn llama3_keeps_fast_frequencies_and_divides_slow_ones() {
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let spec = RopeSpec { dim: 128, theta: 500_000.0, scaling };
        let plain = RopeSpec { scaling: Scaling::Default, ..spec.clone() }.frequencies().0;
        let scaled = spec.frequencies().0;
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
    }

    #[test]
    fn a_table_holds_the_positions_asked_for() {
        let spec = RopeSpec { dim: 4, theta: 100.0, scaling: Scaling::Default };
        let mut table = RopeTable::new(&spec);
        table.extend(3);
        let (cos, sin) = table.angles(2);
        assert!((cos[0] - 2.0_f32.cos()).abs() < 1e-7 && (sin[1] - 0.2_f32.sin()).abs() < 1e-7);
        let before = table.cos.clone();
        table.extend(300);
        assert_eq!(table.cos[..before.len()], before);
        assert_eq!(table.cos.len(), 512 * 2);
    }
}
