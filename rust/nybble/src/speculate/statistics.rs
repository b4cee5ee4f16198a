//! How often guesses of each kind were right.
//!
//! A kind is what a drafter knows about a guess beforehand: its rank in the adjacency matrix, its depth in the tree, the length
//! of the match it continues. Whether a guess was right is known whenever its parent turned out to be right, whether or not
//! the guess itself was computed; so the statistics go on while speculation is off.

/// Weight of what a kind is believed to be before any guess of it was seen, in guesses.
const PRIOR: f32 = 6.0;

/// What counts of a guess after a further one of its kind: about the last 250 matter.
const MEMORY: f32 = 0.996;

/// Ranks told apart in a row of the matrix; later ones count as the last.
pub const RANKS: usize = 8;

/// Depths told apart; deeper ones count as the last.
const DEPTHS: usize = 4;

/// Classes of the certainty with which the model followed a token when it was seen last.
pub const MARGINS: usize = 5;

/// Classes of the length of a match.
const LENGTHS: usize = 8;

/// Classes of a drafter's own probability.
const SHARES: usize = 8;

/// Classes of the probability of what several drafters propose, were they independent.
const AGREEMENTS: usize = 16;

const RECYCLE: usize = 0;
const SUFFIX: usize = RECYCLE + MARGINS * RANKS * DEPTHS;
const PAIRS: usize = SUFFIX + LENGTHS * DEPTHS;
const NGRAM: usize = PAIRS + MARGINS * RANKS * DEPTHS;
const RETRIEVAL: usize = NGRAM + LENGTHS * DEPTHS;
const MODEL: usize = RETRIEVAL + LENGTHS * SHARES;
const RANDOM: usize = MODEL + SHARES;
const AGREED: usize = RANDOM + 1;
const KINDS: usize = AGREED + AGREEMENTS;

/// The probabilities of ranks that give 80 nodes of Token Recycling the mean accepted length its paper reports.
pub const RANK_PRIORS: [f32; RANKS] = [0.457, 0.089, 0.065, 0.043, 0.037, 0.020, 0.016, 0.007];

fn depth_class(depth: usize) -> usize {
    depth.clamp(1, DEPTHS) - 1
}

/// 1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more.
fn length_class(length: usize) -> usize {
    match length {
        0..=4 => length.max(1) - 1,
        5..=6 => 4,
        7..=9 => 5,
        10..=15 => 6,
        _ => 7,
    }
}

fn share_class(share: f32) -> usize {
    ((share * SHARES as f32) as usize).min(SHARES - 1)
}

/// A guess out of the adjacency matrix.
pub fn recycle(margin: usize, rank: usize, depth: usize) -> u16 {
    let row = margin.min(MARGINS - 1) * RANKS + rank.min(RANKS - 1);
    (RECYCLE + row * DEPTHS + depth_class(depth)) as u16
}

/// A guess out of the table of pairs.
pub fn pairs(margin: usize, rank: usize, depth: usize) -> u16 {
    PAIRS as u16 + recycle(margin, rank, depth)
}

/// A continuation of a match of that length found by the suffix automaton.
pub fn suffix(length: usize, depth: usize) -> u16 {
    (SUFFIX + length_class(length) * DEPTHS + depth_class(depth)) as u16
}

/// A continuation of a match of that length found by n-gram lookup.
pub fn ngram(length: usize, depth: usize) -> u16 {
    (NGRAM + length_class(length) * DEPTHS + depth_class(depth)) as u16
}

/// A continuation of a match of that length in the datastore, which that share of the continuations found agree on.
pub fn retrieval(length: usize, share: f32) -> u16 {
    (RETRIEVAL + length_class(length) * SHARES + share_class(share)) as u16
}

/// A token to which a draft model gives that probability.
pub fn model(probability: f32) -> u16 {
    (MODEL + share_class(probability)) as u16
}

/// A token drawn at random.
pub fn random() -> u16 {
    RANDOM as u16
}

/// What several drafters propose, with that probability if they were independent.
pub fn agreed(probability: f32) -> u16 {
    (AGREED + ((probability * AGREEMENTS as f32) as usize).min(AGREEMENTS - 1)) as u16
}

/// Decayed counts of right guesses, by kind.
#[derive(Debug, Clone)]
pub struct Statistics {
    right: Vec<f32>, // [kinds]
    seen: Vec<f32>,  // [kinds]
}

impl Default for Statistics {
    fn default() -> Self {
        let mut right = vec![0.0; KINDS];
        let mut believe = |kind: u16, chance: f32| right[kind as usize] = chance * PRIOR;
        for depth in 1..=DEPTHS {
            for (rank, chance) in RANK_PRIORS.into_iter().enumerate() {
                for margin in 0..MARGINS {
                    believe(recycle(margin, rank, depth), chance);
                    believe(pairs(margin, rank, depth), chance);
                }
            }
            for length in [1, 2, 3, 4, 5, 7, 10, 16] {
                let chance = 0.9 - 0.6 / length as f32;
                believe(suffix(length, depth), chance);
                believe(ngram(length, depth), chance);
            }
        }
        for class in 0..SHARES {
            let share = (class as f32 + 0.5) / SHARES as f32;
            for length in [1, 2, 3, 4, 5, 7, 10, 16] {
                believe(retrieval(length, share), share * (1.0 - 0.5 / length as f32));
            }
            believe(model(share), share);
        }
        for class in 0..AGREEMENTS {
            let probability = (class as f32 + 0.5) / AGREEMENTS as f32;
            believe(agreed(probability), 0.9 * probability);
        }
        believe(random(), 0.05);
        Self { right, seen: vec![PRIOR; KINDS] }
    }
}

impl Statistics {
    /// Probability that a guess of that kind is right, given that its parent is.
    pub fn chance(&self, kind: u16) -> f32 {
        let kind = usize::from(kind);
        self.right[kind] / self.seen[kind]
    }

    /// Counts a guess.
    pub fn count(&mut self, kind: u16, right: bool) {
        let kind = usize::from(kind);
        self.right[kind] = self.right[kind] * MEMORY + f32::from(u8::from(right));
        self.seen[kind] = self.seen[kind] * MEMORY + 1.0;
    }

    /// Probabilities of ranks in the adjacency matrix at a depth, over all certainties, weighted by how often each was seen.
    pub fn ranks(&self, depth: usize) -> [f32; RANKS] {
        std::array::from_fn(|rank| {
            let kinds = (0..MARGINS).map(|margin| usize::from(recycle(margin, rank, depth)));
            let (right, seen) = kinds
                .fold((0.0, 0.0), |(right, seen), kind| (right + self.right[kind], seen + self.seen[kind]));
            right / seen
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_distinct() {
        let mut all = Vec::new();
        for depth in 1..=DEPTHS {
            for rank in 0..RANKS {
                all.extend((0..MARGINS).map(|margin| recycle(margin, rank, depth)));
                all.extend((0..MARGINS).map(|margin| pairs(margin, rank, depth)));
            }
            for length in [1, 2, 3, 4, 5, 7, 10, 16] {
                all.extend([suffix(length, depth), ngram(length, depth)]);
            }
        }
        for class in 0..SHARES {
            let share = (class as f32 + 0.5) / SHARES as f32;
            all.extend([1, 2, 3, 4, 5, 7, 10, 16].map(|length| retrieval(length, share)));
            all.push(model(share));
        }
        all.push(random());
        all.extend((0..AGREEMENTS).map(|class| agreed((class as f32 + 0.5) / AGREEMENTS as f32)));
        assert_eq!(all.len(), KINDS);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), KINDS);
        let far = [recycle(99, 99, 99), suffix(999, 99), retrieval(0, 1.0), model(2.0)];
        assert!(far.iter().all(|kind| usize::from(*kind) < KINDS));
    }

    #[test]
    fn chances_become_what_was_seen() {
        let mut statistics = Statistics::default();
        let kind = recycle(0, 0, 1);
        assert!((statistics.chance(kind) - RANK_PRIORS[0]).abs() < 1e-6);
        for i in 0..2000 {
            statistics.count(kind, i % 4 == 0);
        }
        assert!((statistics.chance(kind) - 0.25).abs() < 0.01, "{}", statistics.chance(kind));
        for _ in 0..2000 {
            statistics.count(kind, false);
        }
        assert!(statistics.chance(kind) < 1e-3);
        let ranks = statistics.ranks(1);
        assert!(ranks[0] < RANK_PRIORS[0] && (ranks[1] - RANK_PRIORS[1]).abs() < 1e-6);
    }
}
