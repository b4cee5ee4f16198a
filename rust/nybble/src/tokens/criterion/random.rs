//! Chance.

use super::{Evidence, Score};
use crate::kernels::attention::Statistic;

/// A random number for each position: what any other criterion has to beat. The same seed gives the same tokens.
pub(super) struct Random;

impl Score for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn statistic(&self) -> Option<Statistic> {
        None
    }

    fn score(&self, evidence: &Evidence<'_>, scores: &mut Vec<f32>) {
        let start = mix(mix(evidence.seed) ^ evidence.layer as u64);
        scores.clear();
        scores.extend(evidence.positions.iter().map(|position| {
            let bits = mix(start ^ *position as u64);
            (bits >> 40) as f32 * (1.0 / (1_u32 << 24) as f32)
        }));
    }
}

/// The output function of splitmix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of `x`.
pub(in crate::tokens) fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
