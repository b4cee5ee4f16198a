//! Choosing a token from logits.
//!
//! The steps come in the order of transformers' `generate`: repeat penalty, temperature, top-k, top-p, min-p, draw. The
//! last three filters each keep the most probable tokens down to some rank, so the result is the shortest of three prefixes
//! of one ranking, and only that prefix is ever sorted: a vocabulary of 256,000 is scanned, never sorted.
//!
//! The buffers keep their memory, so only the first call allocates.
//!
//! Equal logits rank by token id, so a result depends on nothing but its inputs.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::rng::Rng;
use crate::error::{Error, Result};

/// Tokens ranked at first when top-p alone decides how many are needed.
const FIRST_RANKED: usize = 256;

/// Tokens seen lately for which there is memory from the start.
const SEEN: usize = 1024;

/// Settings of a [`Sampler`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most probable token always.
    pub temperature: f32,
    /// Keeps that many tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most probable tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen lately; 1 changes nothing.
    pub repeat_penalty: f32,
    /// How many last tokens count as seen lately.
    pub repeat_last_n: usize,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Refuses settings that mean nothing.
    pub fn validate(&self) -> Result<()> {
        let within = |name: &str, value: f32, low: f32, high: f32| {
            if value >= low && value <= high {
                return Ok(()); // a NaN is in no range
            }
            Err(Error::argument(name, format!("a number from {low} to {high}"), value))
        };
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
    }
}

/// Chooses tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: Sampling,
    rng: Rng,
    /// Token ids under consideration, ranked from the most probable on as far as needed.
    ranked: Vec<u32>,
    /// `exp((logit - max) / temperature)` of each.
    weights: Vec<f64>,
    /// Tokens seen lately, without repetitions.
    seen: Vec<u32>,
}

impl Sampler {
    /// A sampler with these settings.
    pub fn new(settings: Sampling) -> Result<Self> {
        settings.validate()?;
        let rng = Rng::new(settings.seed);
        let seen = Vec::with_capacity(settings.repeat_last_n.min(SEEN));
        Ok(Self { settings, rng, ranked: Vec::new(), weights: Vec::new(), seen })
    }

    /// The settings.
    pub fn settings(&self) -> &Sampling {
        &self.settings
    }

    /// The next token id. `logits` is changed by the repeat penalty; `history` are the tokens so far.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        self.penalize(logits, history);
        let best = best(logits)?;
        if self.settings.temperature == 0.0 || self.settings.top_k == 1 {
            return Ok(best);
        }
        let max = logits[best as usize];
        let temperature = f64::from(self.settings.temperature);
        let weight = |id: u32| (f64::from(logits[id as usize] - max) / temperature).exp();
        self.ranked.clear();
        self.ranked.extend(0..logits.len() as u32);
        let top_k = self.settings.top_k;
        if (1..logits.len()).contains(&top_k) {
            rank(&mut self.ranked, logits, top_k);
            self.ranked.truncate(top_k);
        }
        // Summed by id, or by rank after top-k: either way in an order that depends on the logits alone.
        self.weights.clear();
        self.weights.extend(self.ranked.iter().map(|&id| weight(id)));
        if self.settings.top_p < 1.0 {
            self.keep_top_p(logits, &weight);
        }
        let least = f64::from(self.settings.min_p);
        if least > 0.0 {
            let mut kept = 0;
            for i in 0..self.ranked.len() {
                if self.weights[i] >= least {
                    self.ranked[kept] = self.ranked[i];
                    self.weights[kept] = self.weights[i];
                    kept += 1;
                }
            }
            self.ranked.truncate(kept);
            self.weights.truncate(kept);
        }
        let total: f64 = self.weights.iter().sum();
        let mut left = self.rng.uniform() * total;
        for (&id, &weight) in self.ranked.iter().zip(&self.weights) {
            left -= weight;
            if left < 0.0 {
                return Ok(id);
            }
        }
        Ok(best) // the sum lost its last bits
    }

    /// Shortens `ranked` to the most probable tokens that reach top-p.
    fn keep_top_p(&mut self, logits: &[f32], weight: &dyn Fn(u32) -> f64) {
        let all = self.ranked.len();
        let wanted = self.weights.iter().sum::<f64>() * f64::from(self.settings.top_p);
        let mut count = FIRST_RANKED.min(all);
        loop {
            rank(&mut self.ranked, logits, count);
            let mut reached = 0.0;
            let enough = self.ranked[..count].iter().position(|&id| {
                reached += weight(id);
                reached >= wanted
            });
            if let Some(last) = enough {
                count = last + 1;
                break;
            }
            if count == all {
                break;
            }
            count = count.saturating_mul(4).min(all);
        }
        self.ranked.truncate(count.max(1));
        self.weights.clear();
        self.weights.extend(self.ranked.iter().map(|&id| weight(id)));
    }

    #[expect(clippy::float_cmp, reason = "a penalty of exactly 1 is none")]
    fn penalize(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.settings.repeat_penalty;
        if penalty == 1.0 {
            return;
        }
        let lately = &history[history.len().saturating_sub(self.settings.repeat_last_n)..];
        self.seen.clear();
        self.seen.extend_from_slice(lately);
        self.seen.sort_unstable();
        self.seen.dedup();
        for &id in &self.seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }
}

/// The first of the highest logits; an error when there is none, or when a logit is no number.
fn best(logits: &[f32]) -> Result<u32> {
    let bad = |found: String| Err(Error::argument("logits", "finite numbers", found));
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            return bad(format!("{logit} for token {id}"));
        }
        if logit > best.1 {
            best = (id as u32, logit);
        }
    }
    if best.1 == f32::NEG_INFINITY {
        return bad(format!("none among {}", logits.len()));
    }
    Ok(best.0)
}

/// Reorders `ids` so that its first `count` are the highest, in order.
fn rank(ids: &mut [u32], logits: &[f32], count: usize) {
    let order =
        |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
    if count < ids.len() {
        ids.select_nth_unstable_by(count, order);
    }
    ids[..count].sort_unstable_by(order);
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these values are exact")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampler(change: impl Fn(&mut Sampling)) -> Sampler {
        let mut settings = Sampling { temperature: 1.0, ..Sampling::default() };
        change(&mut settings);
        Sampler::new(settings).expect("good settings")
    }

    /// What transformers does, by sorting everything: the ids that may be drawn.
    fn kept_by_sorting(logits: &[f32], settings: &Sampling) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if settings.top_k > 0 {
            ids.truncate(settings.top_k);
        }
        let max = logits[ids[0] as usize];
        let weight = |id: u32| (f64::from(logits[id as usize] - max) / f64::from(settings.temperature)).exp();
        let total: f64 = ids.iter().map(|&id| weight(id)).sum();
        let mut reached = 0.0;
        let mut kept = Vec::new();
        for &id in &ids {
            if settings.top_p < 1.0 && !kept.is_empty() && reached >= total * f64::from(settings.top_p) {
                break;
            }
            reached += weight(id);
            if weight(id) >= f64::from(settings.min_p) {
                kept.push(id);
            }
        }
        kept
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        let mut greedy = sampler(|s| s.temperature = 0.0);
        assert_eq!(greedy.sample(&mut [0.0, 3.0, 3.0, -1.0], &[]).ok(), Some(1));
        let mut one = sampler(|s| s.top_k = 1);
        assert_eq!(one.sample(&mut [0.0, 3.0, 3.0, -1.0], &[]).ok(), Some(1));
        let mut tiny = sampler(|s| s.top_p = 0.0);
        assert_eq!(tiny.sample(&mut [0.0, 3.0, 2.0, -1.0], &[]).ok(), Some(1));
    }

    #[test]
    fn logits_that_are_no_numbers_are_errors() {
        for bad in [f32::NAN, f32::INFINITY] {
            for temperature in [0.0, 1.0] {
                let mut sampler = sampler(|s| s.temperature = temperature);
                let message = sampler.sample(&mut [0.0, bad], &[]).map_err(|e| e.to_string());
                assert!(message.is_err_and(|m| m.contains("token 1")));
            }
        }
        assert!(sampler(|_| ()).sample(&mut [f32::NEG_INFINITY; 3], &[]).is_err());
        assert!(sampler(|_| ()).sample(&mut [], &[]).is_err());
        assert_eq!(sampler(|_| ()).sample(&mut [f32::NEG_INFINITY, 1.0], &[]).ok(), Some(1));
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        for change in [
            |s: &mut Sampling| s.temperature = f32::NAN,
            |s: &mut Sampling| s.temperature = -1.0,
            |s: &mut Sampling| s.temperature = f32::INFINITY,
            |s: &mut Sampling| s.temperature = 1e9,
            |s: &mut Sampling| s.top_p = 1.5,
            |s: &mut Sampling| s.top_p = f32::NAN,
            |s: &mut Sampling| s.min_p = -0.1,
            |s: &mut Sampling| s.repeat_penalty = 0.0,
            |s: &mut Sampling| s.repeat_penalty = f32::NAN,
        ] {
            let mut settings = Sampling::default();
            change(&mut settings);
            assert!(settings.validate().is_err(), "{settings:?}");
            assert!(Sampler::new(settings).is_err());
        }
        let huge = Sampling { top_k: usize::MAX, repeat_last_n: usize::MAX, ..Sampling::default() };
        assert!(huge.validate().is_ok());
    }

    #[test]
    fn the_penalty_makes_seen_tokens_less_likely_once() {
        let mut greedy = sampler(|s| {
            s.temperature = 0.0;
            s.repeat_penalty = 2.0;
            s.repeat_last_n = 2;
        });
        let mut logits = [4.0, 3.0, -1.0, 0.5];
        assert_eq!(greedy.sample(&mut logits, &[1, 0, 0, 2, 99]).ok(), Some(0));
        assert_eq!(logits, [4.0, 3.0, -2.0, 0.5]); // only the last two tokens count, and 99 is unknown
        let mut logits = [4.0, 3.0, -1.0, 0.5];
        assert_eq!(greedy.sample(&mut logits, &[0, 0]).ok(), Some(1));
        assert_eq!(logits[0], 2.0);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let mut sampler = sampler(|s| s.seed = 3);
        let logits = [0.1_f32.ln(), 0.6_f32.ln(), 0.3_f32.ln()];
        let mut counts = [0.0_f64; 3];
        for _ in 0..20_000 {
            counts[sampler.sample(&mut logits.clone(), &[]).expect("a token") as usize] += 1.0 / 20_000.0;
        }
        for (count, wanted) in counts.iter().zip([0.1, 0.6, 0.3]) {
            assert!((count - wanted).abs() < 0.02, "{counts:?}");
        }
    }

    proptest! {
        #[test]
        fn draws_come_from_the_kept_tokens_and_repeat_with_the_seed(
            logits in prop::collection::vec(-8.0_f32..8.0, 1..600),
            temperature in 0.05_f32..3.0, top_k in 0_usize..40, top_p in 0.05_f32..=1.0, min_p in 0.0_f32..0.5,
            seed in any::<u64>(),
        ) {
            let settings = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
            let kept = kept_by_sorting(&logits, &settings);
            let mut one = Sampler::new(settings.clone()).expect("good settings");
            let mut two = Sampler::new(settings).expect("good settings");
            for _ in 0..8 {
                let token = one.sample(&mut logits.clone(), &[]).expect("a token");
                prop_assert!(kept.contains(&token), "{token} not in {kept:?}");
                prop_assert_eq!(token, two.sample(&mut logits.clone(), &[]).expect("a token"));
            }
        }

        #[test]
        fn the_kept_set_is_the_one_of_a_full_sort(
            logits in prop::collection::vec(-8.0_f32..8.0, 2..2000),
            top_k in 0_usize..40, top_p in 0.05_f32..0.999, min_p in 0.0_f32..0.2,
        ) {
            let settings = Sampling { temperature: 1.0, top_k, top_p, min_p, ..Sampling::default() };
            let wanted = kept_by_sorting(&logits, &settings);
            let mut sampler = Sampler::new(settings).expect("good settings");
            sampler.sample(&mut logits.clone(), &[]).expect("a token");
            // The sums are taken in different orders, so the last token may differ when it is exactly at the edge.
            prop_assert!(sampler.ranked.len().abs_diff(wanted.len()) <= 1);
            let shorter = sampler.ranked.len().min(wanted.len());
            prop_assert_eq!(&sampler.ranked[..shorter], &wanted[..shorter]);
        }
    }
}
