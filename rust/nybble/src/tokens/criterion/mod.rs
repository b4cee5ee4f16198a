//! What makes a token worth keeping: one file a criterion, one line in [`Criterion::all`] for each.

pub(super) mod random;
mod received;
mod start;

use serde::{Serialize, Serializer};

use crate::error::{Error, Result};
use crate::kernels::attention::Statistic;

/// What a criterion judges by.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// Number of tokens.
    pub n: usize,
    /// What attention measured: as many sums as the [`Score::statistic`] has, those of keys for the `n` tokens themselves;
    /// empty without one.
    pub measured: &'a [f32],
    /// How many tokens back a query sees, if not all.
    pub window: Option<usize>,
    /// Positions of the tokens in the text.
    pub positions: &'a [usize],
    /// The layer.
    pub layer: usize,
    /// The policy's seed.
    pub seed: u64,
}

/// A criterion.
pub trait Score: Sync {
    /// Its name in settings.
    fn name(&self) -> &'static str;

    /// What it needs to know of attention.
    fn statistic(&self) -> Option<Statistic>;

    /// Replaces `scores` with one for each token; higher ones stay.
    fn score(&self, evidence: &Evidence<'_>, scores: &mut Vec<f32>);
}

/// A criterion, by name.
#[derive(Clone, Copy)]
pub struct Criterion(&'static dyn Score);

impl Criterion {
    /// The probability a token gives to the text's first one.
    pub const START: Self = Self(&start::Start);

    /// All there are.
    pub const fn all() -> &'static [Self] {
        &[Self::START, Self(&received::Received), Self(&random::Random)]
    }

    /// The criterion of that name.
    pub fn parse(name: &str) -> Result<Self> {
        let found = Self::all().iter().find(|criterion| criterion.0.name() == name);
        found.copied().ok_or_else(|| {
            let names: Vec<_> = Self::all().iter().map(|criterion| criterion.0.name()).collect();
            Error::argument("tokens.criterion", names.join(", "), format!("{name:?}"))
        })
    }
}

impl std::ops::Deref for Criterion {
    type Target = dyn Score;

    fn deref(&self) -> &Self::Target {
        self.0
    }
}

impl std::fmt::Debug for Criterion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl PartialEq for Criterion {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Serialize for Criterion {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(name: &str, evidence: &Evidence<'_>) -> Vec<f32> {
        let mut scores = vec![7.0];
        Criterion::parse(name).expect("known").score(evidence, &mut scores);
        scores
    }

    #[test]
    fn names_are_unique_and_found() {
        let names: Vec<_> = Criterion::all().iter().map(|criterion| criterion.name()).collect();
        assert_eq!(names, ["start", "received", "random"]);
        assert_eq!(Criterion::parse("start").expect("known"), Criterion::START);
        let message = Criterion::parse("end").expect_err("unknown").to_string();
        assert!(message.contains("start, received, random") && message.contains("end"), "{message}");
    }

    #[test]
    fn by_hand() {
        let positions = [4, 5, 9];
        let measured = [0.5, 3.0, 1.0];
        let all =
            Evidence { n: 3, measured: &measured, window: None, positions: &positions, layer: 2, seed: 1 };
        assert_eq!(scores("start", &all), measured);
        // Three queries see the first of the three keys, two the second.
        assert_eq!(scores("received", &all), [0.5 / 3.0, 1.5, 1.0]);
        assert_eq!(scores("received", &Evidence { window: Some(2), ..all }), [0.25, 1.5, 1.0]);
    }

    #[test]
    fn random_scores_depend_on_seed_layer_and_position_only() {
        let positions: Vec<usize> = (0..1000).collect();
        let evidence =
            Evidence { n: 1000, measured: &[], window: None, positions: &positions, layer: 2, seed: 1 };
        let all = scores("random", &evidence);
        assert!(all.iter().all(|score| (0.0..1.0).contains(score)));
        let mean = all.iter().sum::<f32>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
        let some = Evidence { n: 3, positions: &[7, 20, 900], ..evidence };
        assert_eq!(scores("random", &some), [all[7], all[20], all[900]]);
        assert_ne!(scores("random", &Evidence { layer: 3, ..evidence }), all);
        assert_ne!(scores("random", &Evidence { seed: 2, ..evidence }), all);
    }
}
