//! What computing several tokens together costs on this machine, and how many are worth it.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::tree::DraftTree;

/// Numbers of rows that are timed; those between are interpolated.
const ROWS: [usize; 11] = [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32];

/// Rounds of timing; the shortest time of each counts, which other programs disturb least.
const ROUNDS: usize = 3;

/// Seconds after which every number of rows is timed once only.
const BUDGET: f64 = 0.4;

/// Times of one row beyond which more rows are not timed: no tree gives that many tokens.
const WORTHLESS: f64 = 5.0;

/// Share of a new time in what is known.
const NEWS: f64 = 0.03;

/// Speculation must promise at least this much more than plain decoding.
const WORTHWHILE: f64 = 1.03;

/// Seconds that a pass over some rows takes, relative to each other. Their common factor moves with the text's length and the
/// machine's other work, and does not matter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Rows and seconds, ascending; the first entry is of one row.
    points: Vec<(usize, f64)>,
}

impl Times {
    /// Measures them. `pass(rows)` computes so many rows.
    pub fn measure<E>(most: usize, mut pass: impl FnMut(usize) -> Result<(), E>) -> Result<Self, E> {
        let mut points: Vec<(usize, f64)> = Vec::new();
        let begin = Instant::now();
        pass(1)?; // memory is made
        for rows in ROWS.into_iter().filter(|rows| *rows <= most.max(1)) {
            let mut best = f64::INFINITY;
            for round in 0..ROUNDS {
                if round > 0 && begin.elapsed().as_secs_f64() > BUDGET {
                    break;
                }
                let start = Instant::now();
                pass(rows)?;
                best = best.min(start.elapsed().as_secs_f64());
            }
            // More rows never take less: a shorter time is a disturbance of the one before.
            for point in &mut points {
                point.1 = point.1.min(best);
            }
            points.push((rows, best.max(1e-9)));
            if best > WORTHLESS * points[0].1 {
                break;
            }
        }
        Ok(Self { points })
    }

    /// Times known from elsewhere; none if they are no times.
    pub fn known(points: Vec<(usize, f64)>) -> Option<Self> {
        let ascending = points.is_sorted_by(|a, b| a.0 < b.0);
        let good = points.first().is_some_and(|first| first.0 == 1)
            && points.len() <= ROWS.len()
            && points.iter().all(|(_, seconds)| seconds.is_finite() && *seconds > 0.0);
        (ascending && good).then_some(Self { points })
    }

    /// Rows and seconds.
    pub fn points(&self) -> &[(usize, f64)] {
        &self.points
    }

    /// Seconds of so many rows: between two known numbers on the line through them, beyond the last one as that goes on.
    pub fn of(&self, rows: usize) -> f64 {
        let at = self.points.partition_point(|point| point.0 < rows);
        if let Some(point) = self.points.get(at).filter(|point| point.0 == rows || at == 0) {
            return point.1;
        }
        let last = self.points.len() - 1;
        if last == 0 {
            return self.points[0].1 * rows as f64;
        }
        let (low, high) = (self.points[at.min(last) - 1], self.points[at.min(last)]);
        let slope = ((high.1 - low.1) / (high.0 - low.0) as f64).max(0.0);
        low.1 + slope * (rows - low.0) as f64
    }

    /// Takes note of what a pass really took.
    pub fn note(&mut self, rows: usize, seconds: f64) {
        let ratio = (seconds / self.of(rows)).clamp(0.25, 4.0);
        // The machine's pace is common to all numbers of rows; only a lasting difference is this number's own.
        let common = 1.0 + NEWS * (ratio - 1.0);
        for point in &mut self.points {
            point.1 *= common;
        }
        if let Ok(place) = self.points.binary_search_by_key(&rows, |point| point.0) {
            self.points[place].1 *= 1.0 + NEWS * (ratio / common - 1.0) * 0.5;
        }
        // More rows never take less, whatever a disturbance makes it look like.
        for place in 1..self.points.len() {
            self.points[place].1 = self.points[place].1.max(self.points[place - 1].1);
        }
    }

    /// How many of a tree's nodes, taken in `order`, to compute so that tokens come fastest; `overhead` are seconds that each
    /// step takes beside, and `most` the nodes there is room for. 0 where speculation does not pay.
    pub fn best(&self, tree: &DraftTree, order: &[usize], overhead: f64, most: usize) -> usize {
        let mut tokens = 1.0;
        let (mut best, mut speed) = (0, WORTHWHILE / self.of(1));
        for (count, &node) in (1..=most).zip(order) {
            tokens += f64::from(tree.nodes()[node].reach);
            let promised = tokens / (self.of(count + 1) + overhead);
            if promised > speed {
                (best, speed) = (count, promised);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::super::statistics::{self, Statistics};
    use super::*;

    fn times() -> Times {
        Times::known(vec![(1, 1.0), (2, 1.1), (4, 1.5), (8, 3.1)]).expect("good")
    }

    #[test]
    fn times_between_and_beyond_are_on_lines() {
        let times = times();
        for (rows, seconds) in [(1, 1.0), (2, 1.1), (3, 1.3), (4, 1.5), (6, 2.3), (8, 3.1), (10, 3.9)] {
            assert!((times.of(rows) - seconds).abs() < 1e-12, "{rows}: {}", times.of(rows));
        }
        assert!((Times::known(vec![(1, 2.0)]).expect("good").of(3) - 6.0).abs() < 1e-12);
        for bad in [vec![], vec![(2, 1.0)], vec![(1, 1.0), (1, 2.0)], vec![(1, f64::NAN)], vec![(1, 0.0)]] {
            assert!(Times::known(bad).is_none());
        }
    }

    #[test]
    fn a_common_change_changes_no_ratio() {
        let mut times = times();
        let before = times.of(8) / times.of(1);
        for _ in 0..200 {
            for rows in [1, 2, 4, 8] {
                times.note(rows, 3.0 * [0.0, 1.0, 1.1, 0.0, 1.5, 0.0, 0.0, 0.0, 3.1][rows]);
            }
        }
        assert!((times.of(1) - 3.0).abs() < 0.2 && (times.of(8) / times.of(1) - before).abs() < 0.2);
    }

    #[test]
    fn the_tree_is_as_large_as_it_pays() {
        let mut statistics = Statistics::default();
        let (sure, wrong) = (statistics::model(0.9), statistics::random());
        for _ in 0..3000 {
            statistics.count(sure, true);
            statistics.count(wrong, false);
        }
        let mut tree = DraftTree::default();
        let mut order = Vec::new();
        tree.reset(0);
        for token in 0..6 {
            tree.add(token as usize, token, sure, &statistics);
        }
        tree.settle(&statistics);
        tree.by_reach(&mut order);
        // 1 + n tokens in t(n + 1): 4 / 1.5 is the best of 2 / 1.1, 3 / 1.3, 4 / 1.5, 5 / 1.9, 6 / 2.3, 7 / 2.7.
        assert_eq!(times().best(&tree, &order, 0.0, 6), 3);
        assert_eq!(times().best(&tree, &order, 0.0, 2), 2);
        assert_eq!(times().best(&tree, &order, 10.0, 6), 0);
        tree.reset(0);
        tree.add(0, 1, wrong, &statistics);
        tree.settle(&statistics);
        tree.by_reach(&mut order);
        assert_eq!(times().best(&tree, &order, 0.0, 6), 0);
    }

    #[test]
    fn measuring_stops_where_nothing_is_to_be_had() {
        let mut most = 0;
        let times = Times::measure::<()>(100, |rows| {
            most = most.max(rows);
            std::thread::sleep(std::time::Duration::from_micros(rows as u64 * 300));
            Ok(())
        });
        assert!(most < 32 && times.expect("times").of(2) > 0.0);
        assert_eq!(Times::measure(100, |_| Err("no")), Err("no"));
        let small = Times::measure::<()>(3, |_| Ok(())).expect("times");
        assert_eq!(small.points().last().map(|point| point.0), Some(3));
    }
}
