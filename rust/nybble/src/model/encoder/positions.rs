//! Positions for another grid of patches than the one they were learned on.
//!
//! Rows and columns are interpolated one after the other by cubic convolution (Keys 1981), with the constants and the
//! treatment of edges of `PyTorch`'s `interpolate(mode="bicubic", align_corners=False)`, which transformers uses: without
//! smoothing `a = -3/4` and the outermost value repeated beyond the edge; with it (`antialias`) `a = -1/2`, the kernel as wide
//! as the steps between new values where they are longer than the old ones', and its weights within the grid scaled to sum 1.

/// `table [from rows, from cols, width]` at the points of another grid.
pub(super) fn interpolate(
    table: &[f32],
    from: [usize; 2],
    to: [usize; 2],
    width: usize,
    antialias: bool,
) -> Vec<f32> {
    let columns = weights(from[1], to[1], antialias);
    let rows = weights(from[0], to[0], antialias);
    let mut narrow = vec![0.0; from[0] * to[1] * width]; // [from rows, to cols, width]
    for (line, out) in table.chunks_exact(from[1] * width).zip(narrow.chunks_exact_mut(to[1] * width)) {
        for (taps, out) in columns.iter().zip(out.chunks_exact_mut(width)) {
            for &(at, weight) in taps {
                add(out, &line[at * width..][..width], weight);
            }
        }
    }
    let line = to[1] * width;
    let mut out = vec![0.0; to[0] * line];
    for (taps, out) in rows.iter().zip(out.chunks_exact_mut(line)) {
        for &(at, weight) in taps {
            add(out, &narrow[at * line..][..line], weight);
        }
    }
    out
}

fn add(out: &mut [f32], values: &[f32], weight: f32) {
    for (out, value) in out.iter_mut().zip(values) {
        *out += weight * value;
    }
}

/// For each of `to` points the places among `from` that it is made of, with their weights.
fn weights(from: usize, to: usize, antialias: bool) -> Vec<Vec<(usize, f32)>> {
    let step = from as f64 / to as f64;
    (0..to)
        .map(|point| if antialias { smooth(from, point, step) } else { plain(from, point, step) })
        .collect()
}

fn plain(from: usize, point: usize, step: f64) -> Vec<(usize, f32)> {
    let at = (point as f64 + 0.5) * step - 0.5;
    let first = at.floor() as isize - 1;
    let last = from as isize - 1;
    let tap = |i: isize| (i.clamp(0, last) as usize, cubic(at - i as f64, -0.75) as f32);
    (first..first + 4).map(tap).collect()
}

fn smooth(from: usize, point: usize, step: f64) -> Vec<(usize, f32)> {
    let stretch = step.max(1.0);
    let at = (point as f64 + 0.5) * step;
    let first = (at - 2.0 * stretch + 0.5).max(0.0) as usize;
    let end = ((at + 2.0 * stretch + 0.5) as usize).min(from);
    let weight = |i: usize| cubic((i as f64 + 0.5 - at) / stretch, -0.5);
    let sum: f64 = (first..end).map(weight).sum();
    (first..end).map(|i| (i, (weight(i) / sum) as f32)).collect()
}

/// Keys's kernel.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_grid_is_left_as_it_is() {
        let table: Vec<f32> = (0..24).map(|i| i as f32).collect();
        for antialias in [false, true] {
            assert_eq!(interpolate(&table, [3, 4], [3, 4], 2, antialias), table);
        }
    }

    #[test]
    fn constants_stay_and_weights_sum_to_one() {
        for (from, to) in [(1, 5), (5, 1), (7, 3), (3, 7), (16, 37), (37, 16)] {
            for antialias in [false, true] {
                let taps = weights(from, to, antialias);
                assert!(taps.iter().flatten().all(|tap| tap.0 < from));
                for taps in taps {
                    let sum: f32 = taps.iter().map(|tap| tap.1).sum();
                    assert!((sum - 1.0).abs() < 1e-6, "{from} to {to}: {sum}");
                }
            }
        }
    }

    #[test]
    fn lines_stay_lines_away_from_the_edges() {
        let table: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let finer = interpolate(&table, [1, 12], [1, 24], 1, true); // with a = -1/2 cubic convolution is exact
        for (i, value) in finer.iter().enumerate().skip(4).take(16) {
            let expected = i as f32 / 2.0 - 0.25;
            assert!((value - expected).abs() < 1e-5, "{i}: {value}, not {expected}");
        }
    }
}
