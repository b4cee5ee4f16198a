//! Which tokens stay.

/// Replaces `keep` with the `count` rows of the highest scores, in ascending order; of equal ones the earlier stay. A NaN is
/// below all numbers. Where there are not more than `count` rows, all stay.
///
/// In time proportional to the rows: the best are told apart, not sorted.
pub fn highest(scores: &[f32], count: usize, keep: &mut Vec<usize>) {
    keep.clear();
    keep.extend(0..scores.len());
    if count >= scores.len() {
        return;
    }
    let value = |row: usize| if scores[row].is_nan() { f32::NEG_INFINITY } else { scores[row] };
    if count > 0 {
        // -0 and 0 are equal: the earlier stays.
        let order = |a: &usize, b: &usize| {
            value(*b).partial_cmp(&value(*a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
        };
        keep.select_nth_unstable_by(count - 1, order);
    }
    keep.truncate(count);
    keep.sort_unstable();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept(scores: &[f32], count: usize) -> Vec<usize> {
        let mut keep = vec![9; 3];
        highest(scores, count, &mut keep);
        keep
    }

    #[test]
    fn the_highest_stay_in_order() {
        assert_eq!(kept(&[3.0, 1.0, 2.0, 5.0], 2), [0, 3]);
        assert_eq!(kept(&[1.0, 2.0, 2.0, 2.0], 2), [1, 2]);
        assert_eq!(kept(&[-0.0, 0.0, 0.0], 1), [0]);
        assert_eq!(kept(&[f32::NAN, -3.0, f32::INFINITY, f32::NAN], 2), [1, 2]);
        assert_eq!(kept(&[f32::NAN, f32::NEG_INFINITY], 1), [0]);
        assert_eq!((kept(&[], 3), kept(&[1.0, 2.0], 0)), (vec![], vec![]));
        assert_eq!(kept(&[1.0, 2.0], 7), [0, 1]);
    }

    proptest! {
        #[test]
        fn as_a_stable_sort_would(scores in prop::collection::vec(prop_oneof![
            Just(f32::NAN), (-3i8..3).prop_map(f32::from), any::<f32>()], 0..60), count in 0usize..70) {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            let value = |row: &usize| if scores[*row].is_nan() { f32::NEG_INFINITY } else { scores[*row] };
            order.sort_by(|a, b| value(b).partial_cmp(&value(a)).expect("no NaN")); // stable
            order.truncate(count);
            order.sort_unstable();
            prop_assert_eq!(kept(&scores, count), order);
        }
    }
}
