//! What skipping costs and saves on this machine, measured where it will happen: in the middle of a token.
//!
//! A walk goes through all layers and the head as generating a token does, so that weights come from where they come from
//! then: the caches hold what fits of a whole model, not of the matrices that are being compared. (Compared by themselves, the
//! 30 `down` matrices of SmolLM2-135M fit into a cache of 32 MB, of which columns are read faster than from memory, where a
//! token finds them: the columns of 60 to 120 linears were skipped for a gain, and the model was slower by 2 to 4 %.) Of each
//! walk only what may be skipped is timed, everything else runs dense.
//!
//! Dense and sparse walks take turns, and of each layer's times the shortest counts: other programs can only make them longer.
//! Medians of ratios were tried first; where others want the same cores and threads wait for one another, speed-ups of the
//! same linear came out anywhere between 0.04 and 8.5.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::{INPUTS, Input, LayerThresholds, Measured, Times};
use crate::error::Result;
use crate::kernels::quantize::{Activations, Source};
use crate::model::blocks::{Active, Layer, Mlp};
use crate::model::linear::{Linear, Run, Skippable};
use crate::model::load::Weights;
use crate::pack::{Bundles, Layout, Packed};

/// Shares of neurons, or of inputs, that are timed.
const SHARES: [f64; 4] = [0.1, 0.3, 0.5, 0.7];

/// Turns, at most and at least; the least are enough when they have taken as long as [`ENOUGH`].
const TURNS: usize = 15;
const FEWEST: usize = 5;
const ENOUGH: Duration = Duration::from_secs(2);

/// What is timed: each input's columns and neurons.
const TIMED: usize = INPUTS + 1;
const NEURONS: usize = INPUTS;

/// Ways to walk: dense, and with each of the shares.
const KINDS: usize = SHARES.len() + 1;

/// What may be skipped in a layer.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pub(super) neurons: Option<Bundles>,
    pub(super) columns: [Option<Skippable>; INPUTS],
}

impl Candidates {
    pub(super) fn of(run: Run<'_>, layer: &Layer, thresholds: &LayerThresholds) -> Result<Self> {
        let mut found = Self::default();
        if !thresholds.neurons.is_empty() {
            found.neurons = bundle(run, layer)?;
        }
        for input in Input::ALL {
            let cut = thresholds.inputs[input as usize] > 0.0;
            if let Some((linear, which)) = reader(layer, input, thresholds).filter(|_| cut) {
                found.columns[input as usize] = linear.skippable(which, run.pool)?;
            }
        }
        Ok(found)
    }
}

/// The matrices of a layer that read an input.
fn reader<'a>(
    layer: &'a Layer,
    input: Input,
    thresholds: &LayerThresholds,
) -> Option<(&'a Linear, Range<usize>)> {
    let linear = match input {
        Input::Q | Input::Qkv => &layer.attention.as_ref()?.qkv,
        Input::Out => &layer.attention.as_ref()?.out,
        Input::GateUp => &layer.mlp.as_ref()?.gate_up,
        Input::Down => &layer.mlp.as_ref()?.down,
    };
    let which = match input {
        Input::Q => 0..1,
        Input::Qkv => usize::from(thresholds.q() > 0.0)..linear.count(),
        _ => 0..linear.count(),
    };
    Some((linear, which))
}

/// The neurons of a layer, if its matrices are of the kind that sparse kernels read.
fn bundle(run: Run<'_>, layer: &Layer) -> Result<Option<Bundles>> {
    let Some((up, down)) = layer.mlp.as_ref().and_then(Mlp::neurons) else { return Ok(None) };
    let good = [up, down].iter().all(|part| {
        part.weight.layout() == Layout::W4 && part.rounding.is_some_and(|rounding| rounding.bits == 8)
    });
    if good { Bundles::new(Some(&up.weight), &down.weight, run.pool).map(Some) } else { Ok(None) }
}

/// Times of everything that may be skipped in some layer, on average over the layers where it may.
pub(super) fn measure(run: Run<'_>, weights: &Weights, layers: &[Candidates]) -> Result<Measured> {
    let mut token = Token::new(run, weights, layers);
    let mut best = vec![[[f64::INFINITY; TIMED]; KINDS]; layers.len()];
    let begin = Instant::now();
    for turn in 0..TURNS {
        if turn >= FEWEST && begin.elapsed() > ENOUGH {
            break;
        }
        for kind in 0..KINDS {
            token.draw(turn, kind.checked_sub(1).map(|kind| SHARES[kind]));
            // Of two walks the second counts: what the kind before left in the caches is gone by then.
            run.pool.region(|| token.walk(&mut |_, _, _| {}))?;
            run.pool.region(|| {
                token.walk(&mut |layer, what, seconds| {
                    let best = &mut best[layer][kind][what];
                    *best = best.min(seconds);
                })
            })?;
        }
    }
    let times = |what: usize| {
        let timed = || best.iter().filter(|layer| layer[0][what].is_finite());
        let count = timed().count();
        let mean = |kind: usize| timed().map(|layer| layer[kind][what]).sum::<f64>().max(1e-9) / count as f64;
        let sparse = || SHARES.into_iter().zip((1..).map(mean)).collect();
        (count > 0).then(|| Times { dense: mean(0), sparse: sparse() })
    };
    let (neurons, inputs) = (times(NEURONS), std::array::from_fn(times));
    Ok(Measured { neurons, inputs, ..Measured::default() })
}

/// A token without attention's products, norms and sums: all weights are read, in order.
struct Token<'a> {
    run: Run<'a>,
    weights: &'a Weights,
    layers: &'a [Candidates],
    /// Whether walks skip.
    sparse: bool,
    x: Vec<f32>, // what linears read of which columns are skipped, other than 0 in a share of the places
    full: Vec<f32>, // what all others read
    least: Vec<f32>, // thresholds that `full` is above in that share of the places
    gate_up: Vec<f32>,
    act: Vec<f32>,
    y: Vec<f32>,
    rounded: Activations,
    active: Active,
}

impl<'a> Token<'a> {
    fn new(run: Run<'a>, weights: &'a Weights, layers: &'a [Candidates]) -> Self {
        let matrices = weights.layers.iter().flat_map(Layer::matrices).chain(weights.head.weights());
        let widest = matrices.map(|matrix| matrix.cols()).max().unwrap_or(0);
        let linears = weights.layers.iter().flat_map(|layer| linears(layer).into_iter().flatten());
        let longest = linears.map(|(linear, _)| linear.rows()).max().unwrap_or(0);
        Self {
            run,
            weights,
            layers,
            sparse: false,
            x: vec![0.0; widest],
            full: (0..widest).map(value).collect(),
            least: vec![0.0; widest],
            gate_up: vec![0.0; longest],
            act: vec![0.0; widest],
            y: vec![0.0; longest.max(weights.head.rows())],
            rounded: Activations::new(),
            active: Active::default(),
        }
    }

    /// Chooses what is active in a turn, a share of everything, or all for dense walks: which ones does not follow any pattern
    /// that memory could.
    fn draw(&mut self, turn: usize, share: Option<f64>) {
        self.sparse = share.is_some();
        for (n, (x, least)) in self.x.iter_mut().zip(&mut self.least).enumerate() {
            let hash = (n + 7919 * turn).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let active = share.is_none_or(|share| (hash as f64) < share * f64::from(1 << 24));
            (*x, *least) = if active { (value(n), 0.0) } else { (0.0, f32::INFINITY) };
        }
    }

    /// Goes through a token once and tells layers, what may be skipped there, and its seconds.
    fn walk(&mut self, tell: &mut dyn FnMut(usize, usize, f64)) -> Result<()> {
        for (index, (layer, candidates)) in self.weights.layers.iter().zip(self.layers).enumerate() {
            for (linear, inputs) in linears(layer).into_iter().flatten() {
                if let (Some(bundles), Some(mlp), Input::GateUp | Input::Down) =
                    (&candidates.neurons, &layer.mlp, inputs[0])
                {
                    if inputs[0] == Input::GateUp {
                        let begin = Instant::now();
                        self.neurons(mlp, bundles)?;
                        tell(index, NEURONS, begin.elapsed().as_secs_f64());
                    }
                    continue;
                }
                let mut done = 0; // matrices
                for &input in inputs {
                    if let Some(columns) = &candidates.columns[input as usize] {
                        let begin = Instant::now();
                        self.columns(linear, columns)?;
                        tell(index, input as usize, begin.elapsed().as_secs_f64());
                        done = columns.which().end.max(done);
                    }
                }
                self.dense(linear, done..linear.count())?;
            }
        }
        self.dense(&self.weights.head, 0..self.weights.head.count())
    }

    fn dense(&mut self, linear: &Linear, which: Range<usize>) -> Result<()> {
        if which.is_empty() {
            return Ok(());
        }
        let x = &mut Source::Given(&self.full[..width(linear)]);
        linear.forward_parts(self.run, which, x, 1, &mut self.rounded, &mut self.y[..linear.rows()])
    }

    fn columns(&mut self, linear: &Linear, columns: &Skippable) -> Result<()> {
        let x = &mut Source::Given(&self.x[..columns.inputs()]);
        let (rounded, y) = (&mut self.rounded, &mut self.y[..linear.rows()]);
        if !self.sparse {
            return linear.forward_parts(self.run, columns.which(), x, 1, rounded, y);
        }
        linear.forward_skipping(self.run, columns, x, &mut self.active.list, rounded, y).map(drop)
    }

    /// A feed-forward block of which neurons may be skipped.
    fn neurons(&mut self, mlp: &Mlp, bundles: &Bundles) -> Result<()> {
        let (run, inner) = (self.run, mlp.inner);
        let (x, full, least) = (&self.full[..width(&mlp.gate_up)], &self.full[..inner], &self.least[..inner]);
        let (gate_up, act) = (&mut self.gate_up[..mlp.gate_up.rows()], &mut self.act[..inner]);
        let (rounded, y) = (&mut self.rounded, &mut self.y[..mlp.down.rows()]);
        if !self.sparse {
            mlp.gate_up.forward(run, x, 1, rounded, gate_up)?;
            mlp.activate(run, gate_up, least, act);
            return mlp.down.forward(run, full, 1, rounded, y);
        }
        mlp.gate_up.forward_parts(run, 0..1, &mut Source::Given(x), 1, rounded, gate_up)?;
        act.copy_from_slice(&gate_up[..inner]);
        mlp.act(run, act);
        self.active.find(full, least); // which neurons are active is drawn, not computed
        mlp.skip(run, bundles, &mut self.active, act, rounded, y)
    }
}

/// A magnitude that rounding does not make 0.
fn value(n: usize) -> f32 {
    1.0 + (n as f32 * 0.7).sin() / 2.0
}

fn width(linear: &Linear) -> usize {
    linear.weights().next().map_or(0, |matrix: &std::sync::Arc<Packed>| matrix.cols())
}

/// The linears of a layer in the order in which a token goes through them, with what they read.
fn linears(layer: &Layer) -> [Option<(&Linear, &'static [Input])>; 4] {
    let (attention, mlp) = (layer.attention.as_ref(), layer.mlp.as_ref());
    [
        attention.map(|attention| (&attention.qkv, &[Input::Q, Input::Qkv][..])),
        attention.map(|attention| (&attention.out, &[Input::Out][..])),
        mlp.map(|mlp| (&mlp.gate_up, &[Input::GateUp][..])),
        mlp.map(|mlp| (&mlp.down, &[Input::Down][..])),
    ]
}
