//! How many tokens stay, and where the others go.
//!
//! Pruning is progressive: with `m` pruning layers and the fraction `beta` to be gone after the last, each removes
//! `gamma = 1 - (1 - beta)^(1/m)` of the tokens that reach it, so that `1 - beta` of them are left in the end
//! (Agile-Quant, arXiv 2312.05693).

/// Tokens of `n` that stay after the pruning layer number `step` (from 1) of `steps`: `n (1 - ratio)^(step / steps)`, to the
/// nearest whole one and at least 1.
///
/// Counted from the beginning, not from the layer before, so that rounding does not add up.
pub fn kept(n: usize, ratio: f64, step: usize, steps: usize) -> usize {
    let left = (1.0 - ratio).powf(step as f64 / steps as f64);
    ((n as f64 * left).round() as usize).clamp(n.min(1), n)
}

/// The pruning layers of a model of `depth` layers where none are named: from a quarter of the depth on, an eighth apart.
///
/// The first layers are spared: their attention is to neighbours, and says nothing about a token's worth yet. Behind the last
/// layer there is nothing to be saved. A model of two layers has only the first to prune in, one of one layer none.
pub fn default_layers(depth: usize) -> Vec<usize> {
    let Some(latest) = depth.checked_sub(2) else { return Vec::new() };
    let mut layers: Vec<usize> = (2..8).map(|eighth| (depth * eighth / 8).max(1).min(latest)).collect();
    layers.dedup();
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_shrinks_by_the_same_factor() {
        // beta = 3/4 over two layers: each halves.
        assert_eq!((kept(100, 0.75, 1, 2), kept(100, 0.75, 2, 2)), (50, 25));
        assert_eq!(kept(10, 0.3, 1, 1), 7);
        assert_eq!(kept(1000, 0.1, 5, 5), 900);
        for n in [0, 1, 2, 17, 448] {
            assert_eq!(kept(n, 0.0, 3, 6), n);
            assert_eq!(kept(n, 1.0 - f64::EPSILON, 6, 6), n.min(1));
            for ratio in [0.01, 0.3, 0.9] {
                let counts: Vec<usize> = (0..=6).map(|step| kept(n, ratio, step, 6)).collect();
                assert_eq!(counts[0], n);
                assert!(counts.is_sorted_by(|a, b| a >= b), "{counts:?}");
                assert!((counts[6] as f64 - (n as f64 * (1.0 - ratio)).max(n.min(1) as f64)).abs() <= 0.5);
            }
        }
    }

    #[test]
    fn layers_are_inside_and_not_first() {
        assert_eq!(default_layers(30), [7, 11, 15, 18, 22, 26]);
        assert_eq!(default_layers(12), [3, 4, 6, 7, 9, 10]);
        assert_eq!((default_layers(3), default_layers(2)), (vec![1], vec![0]));
        assert!(default_layers(1).is_empty() && default_layers(0).is_empty());
        for depth in 3..100 {
            let layers = default_layers(depth);
            assert!(layers.is_sorted_by(|a, b| a < b), "{layers:?}");
            assert!(layers.iter().all(|layer| (1..depth - 1).contains(layer)), "{layers:?} of {depth}");
        }
    }
}
