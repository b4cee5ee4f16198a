//! The largest of many logits.

/// Logits compared at once.
const BLOCK: usize = 64;

/// Largest `k` of [`top`].
pub(super) const MOST: usize = 64;

/// Fills `best` with the indices of the largest logits, largest first; equal ones rank by index, and what is no number is left
/// out. Returns how many there are.
///
/// A vocabulary is gone through once, in blocks whose largest logit is compared with the last one kept: after the first few
/// blocks hardly any needs a second look.
pub fn top(logits: &[f32], best: &mut [u32], values: &mut [f32]) -> usize {
    let k = best.len().min(values.len());
    let mut count = 0;
    let mut least = f32::NEG_INFINITY;
    for (block, start) in logits.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
        if count == k && largest(block) <= least {
            continue;
        }
        for (&value, index) in block.iter().zip(start..) {
            if !(value > least || (count < k && value > f32::NEG_INFINITY)) {
                continue;
            }
            let mut at = count.min(k - 1);
            while at > 0 && values[at - 1] < value {
                (values[at], best[at]) = (values[at - 1], best[at - 1]);
                at -= 1;
            }
            (values[at], best[at]) = (value, index);
            count = (count + 1).min(k);
            if count == k {
                least = values[k - 1];
            }
        }
    }
    count
}

fn largest(block: &[f32]) -> f32 {
    let (lanes, rest) = block.as_chunks::<16>();
    let mut top = [f32::NEG_INFINITY; 16];
    for lane in lanes {
        for (top, &value) in top.iter_mut().zip(lane) {
            *top = if value > *top { value } else { *top };
        }
    }
    top.iter().chain(rest).fold(f32::NEG_INFINITY, |top, &value| if value > top { value } else { top })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_what_sorting_gives(
            logits in prop::collection::vec((-20_i32..20).prop_map(|x| match x {
                -20 => f32::NAN,
                -19 => f32::NEG_INFINITY,
                x => x as f32 / 4.0,
            }), 0..700),
            k in 1_usize..12,
        ) {
            let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|i| logits[*i as usize] > f32::NEG_INFINITY).collect();
            ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
            ids.truncate(k);
            let (mut best, mut values) = (vec![0; k], vec![0.0; k]);
            let count = top(&logits, &mut best, &mut values);
            prop_assert_eq!(&best[..count], &ids[..]);
            prop_assert!(best[..count].iter().zip(&values).all(|(id, value)| logits[*id as usize] == *value));
        }
    }
}
