//! Activation sparsity at work: what is taken for zero, and where skipping it saves time.
//!
//! Thresholds are part of a model, as its weights are: a value at or below its threshold counts as 0 in prompts, in drafts
//! that are verified and in tokens one by one, whichever kernel runs. Which kernel that is decides the clock alone: the
//! sparse ones give the same bits as the dense ones do for the same zeros. [`Sparsity::probe`] measures both once for a
//! model and machine; until then, and where it does not pay, dense ones run.
//!
//! Neurons are skipped as wholes; of inputs that have a threshold, the columns of what reads them.
//!
//! Skipping is for one token at a time. Several rows (a prompt, drafts) share a dense product, which reads every weight once
//! for all of them; the neurons that any of a few rows needs are soon most of them, and each row would multiply its own.
//!
//! In a folder the thresholds are the file `sparsity.safetensors`: for each layer `layers.{i}.neurons`, one for each neuron
//! of the feed-forward block, compared with the magnitude of the activation function's value; and `layers.{i}.inputs`, five,
//! compared with magnitudes of what queries alone, queries, keys and values, the attention's output projection, gate and up,
//! and down read. 0 leaves everything as it is. `active` has for each layer the share of neurons that calibration saw at work.

use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::blocks::{Active, Layer, Mlp};
use super::linear::{Linear, Run, Skippable};
use super::load::Weights;
use super::spec::{AttentionSpec, Qkv, Spec};
use crate::error::{Error, Result};
use crate::format::safetensors::SafeTensors;
use crate::format::{Access, Dtype};
use crate::kernels::quantize::{Activations, Source};
use crate::pack::{Bundles, Layout};
use crate::threads::Pool;

/// The file in a model folder.
pub const FILE: &str = "sparsity.safetensors";

/// Inputs with a threshold.
pub const INPUTS: usize = 5;

/// The inputs, in the order of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// Of queries alone.
    Q,
    /// Of queries, keys and values; with a threshold for queries alone, of keys and values.
    Qkv,
    /// Of attention's output projection.
    Out,
    /// Of gate and up.
    GateUp,
    /// Of down.
    Down,
}

impl Input {
    const ALL: [Self; INPUTS] = [Self::Q, Self::Qkv, Self::Out, Self::GateUp, Self::Down];
}

/// What is taken for zero in a layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerThresholds {
    /// For each neuron the largest magnitude of the activation function's value that counts as 0; empty for none.
    pub neurons: Vec<f32>,
    /// Largest magnitudes that count as 0 of the inputs of queries alone, of queries, keys and values, of the attention's
    /// output projection, of gate and up, and of down.
    pub inputs: [f32; INPUTS],
    /// Share of neurons that calibration saw above their thresholds.
    pub active: f32,
}

impl LayerThresholds {
    pub(super) fn q(&self) -> f32 {
        self.inputs[0]
    }

    pub(super) fn qkv(&self) -> f32 {
        self.inputs[1]
    }

    pub(super) fn out(&self) -> f32 {
        self.inputs[2]
    }

    pub(super) fn gate_up(&self) -> f32 {
        self.inputs[3]
    }

    pub(super) fn down(&self) -> f32 {
        self.inputs[4]
    }
}

/// Sets to 0 what is not larger than a threshold; NaN stays.
pub(super) fn cut(values: &mut [f32], threshold: f32) {
    if threshold > 0.0 {
        for value in values {
            *value = if value.abs() <= threshold { 0.0 } else { *value };
        }
    }
}

/// Reads the thresholds of a folder.
pub fn read(path: &Path, layers: usize) -> Result<Vec<LayerThresholds>> {
    let file = SafeTensors::open(path, Access::Read)?;
    let floats = |name: &str, expected: Option<usize>| -> Result<Vec<f32>> {
        let info = file.tensors().get(name);
        let bytes = file.bytes(name)?;
        let good = info.is_some_and(|info| {
            info.dtype == Dtype::F32 && info.shape.len() == 1 && expected.is_none_or(|n| info.shape == [n])
        });
        if !good {
            let expected = expected.map_or("F32 values".into(), |n| format!("{n} F32 values"));
            let found =
                info.map_or_else(String::new, |info| format!("{} {:?}", info.dtype.name(), info.shape));
            return Err(Error::format(path, name, expected, found));
        }
        Ok(bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect())
    };
    let active = floats("active", None)?;
    if active.len() != layers {
        let expected = format!("thresholds of this model's {layers} layers");
        return Err(Error::format(path, "active", expected, format!("those of {}", active.len())));
    }
    let layer = |(i, active)| {
        let inputs = floats(&format!("layers.{i}.inputs"), Some(INPUTS))?;
        let name = format!("layers.{i}.neurons");
        let neurons = if file.tensors().contains_key(&name) { floats(&name, None)? } else { Vec::new() };
        Ok(LayerThresholds { neurons, inputs: std::array::from_fn(|i| inputs[i]), active })
    };
    active.into_iter().enumerate().map(layer).collect()
}

/// Seconds of a feed-forward block of one token on this machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// With all neurons, by the dense kernels.
    pub dense: f64,
    /// With shares of them, by the sparse kernels: share and seconds, ascending.
    pub sparse: Vec<(f64, f64)>,
}

impl Times {
    /// Whether they are times.
    fn good(&self) -> bool {
        let positive = |seconds: f64| seconds.is_finite() && seconds > 0.0;
        positive(self.dense)
            && self.sparse.len() >= 2
            && self.sparse.len() <= 16
            && self.sparse.is_sorted_by(|a, b| a.0 < b.0)
            && self.sparse.iter().all(|(share, seconds)| (0.0..=1.0).contains(share) && positive(*seconds))
    }

    /// Seconds with a share of the neurons, by the sparse kernels: on the line through the nearest two.
    pub fn of(&self, share: f64) -> f64 {
        let at = self.sparse.partition_point(|point| point.0 < share).clamp(1, self.sparse.len() - 1);
        let (low, high) = (self.sparse[at - 1], self.sparse[at]);
        low.1 + (high.1 - low.1) / (high.0 - low.0) * (share - low.0)
    }

    /// The largest share of neurons up to which skipping the others pays; 0 where it never does.
    fn break_even(&self) -> f64 {
        let steps = 200;
        let pays = |step: &i32| self.of(f64::from(*step) / f64::from(steps)) * WORTHWHILE < self.dense;
        f64::from((0..=steps).take_while(pays).last().unwrap_or(0)) / f64::from(steps)
    }
}

/// What was measured of a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Of feed-forward blocks without some neurons, if neurons have thresholds.
    pub neurons: Option<Times>,
    /// Of what reads each of the inputs without some columns, for those that have a threshold in some layer.
    pub inputs: [Option<Times>; INPUTS],
}

/// Dense kernels must take this much longer.
const WORTHWHILE: f64 = 1.05;

/// Shares of neurons that are timed.
const SHARES: [f64; 4] = [0.1, 0.3, 0.5, 0.7];

/// Rounds of timing; the median of each counts.
const ROUNDS: usize = 5;

/// Thresholds that fit a model, and where skipping pays.
#[derive(Debug)]
pub struct Sparsity {
    pub(super) layers: Vec<LayerThresholds>,
    plan: OnceLock<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    measured: Measured,
    /// Neurons of each layer, where skipping some pays, and how many may be active at most.
    layers: Vec<Option<(Bundles, usize)>>,
    /// Columns of each layer by input, where skipping some pays.
    columns: Vec<[Option<Skippable>; INPUTS]>,
}

/// What may be skipped in a layer, and the count of what was.
pub(super) struct Skip<'a> {
    pub(super) sparsity: &'a Sparsity,
    pub(super) layer: usize,
    pub(super) skipped: &'a mut Skipped,
}

impl<'a> Skip<'a> {
    /// What is taken for zero there.
    pub(super) fn cuts(&self) -> &'a LayerThresholds {
        &self.sparsity.layers[self.layer]
    }
}

impl Sparsity {
    /// Checks thresholds against a model.
    pub(super) fn new(layers: Vec<LayerThresholds>, spec: &Spec) -> Result<Self> {
        if layers.len() != spec.layers.len() {
            let expected = format!("one set for each of the model's {} layers", spec.layers.len());
            return Err(Error::argument("thresholds", expected, layers.len()));
        }
        for (i, (layer, model)) in layers.iter().zip(&spec.layers).enumerate() {
            let at = |part: &str| format!("thresholds: layers.{i}.{part}");
            let inner = model.mlp.as_ref().map_or(0, |mlp| mlp.up.rows);
            if !layer.neurons.is_empty() && layer.neurons.len() != inner {
                return Err(Error::argument(at("neurons"), format!("{inner} values"), layer.neurons.len()));
            }
            for (part, values) in [("neurons", &layer.neurons[..]), ("inputs", &layer.inputs)] {
                // Infinity turns a neuron off; of an input it would leave nothing.
                let good = |value: &f32| *value >= 0.0 && (part == "neurons" || value.is_finite());
                if let Some(value) = values.iter().find(|value| !good(value)) {
                    return Err(Error::argument(at(part), "numbers of at least 0", value));
                }
            }
            if !(0.0..=1.0).contains(&layer.active) {
                return Err(Error::argument(at("active"), "a share from 0 to 1", layer.active));
            }
            let fused = |attention: &AttentionSpec| matches!(attention.qkv, Qkv::Fused { .. });
            if layer.q() > 0.0 && model.attention.as_ref().is_some_and(fused) {
                let item = "a threshold for what queries alone read, in a model that computes them with keys and values";
                return Err(Error::unsupported(item, "one for all three is"));
            }
            let normed = model.attention_norms.residual_is_normed || model.mlp_norms.residual_is_normed;
            if normed && layer.inputs.iter().any(|threshold| *threshold > 0.0) {
                let item = "thresholds of inputs that are the residual, too";
                return Err(Error::unsupported(item, "thresholds of neurons are"));
            }
        }
        Ok(Self { layers, plan: OnceLock::new() })
    }

    /// The thresholds.
    pub fn thresholds(&self) -> &[LayerThresholds] {
        &self.layers
    }

    /// What was measured, if anything was.
    pub fn measured(&self) -> Option<&Measured> {
        self.plan.get().map(|plan| &plan.measured)
    }

    /// Layers in which some neurons are skipped when few enough are active.
    pub fn sparse_layers(&self) -> usize {
        self.plan.get().map_or(0, |plan| plan.layers.iter().flatten().count())
    }

    /// Linears of which columns are skipped when few enough inputs are other than 0.
    pub fn sparse_linears(&self) -> usize {
        self.plan.get().map_or(0, |plan| plan.columns.iter().flatten().flatten().count())
    }

    /// Bytes of memory for neuron bundles and columns.
    pub fn bytes(&self) -> usize {
        let Some(plan) = self.plan.get() else { return 0 };
        let neurons: usize = plan.layers.iter().flatten().map(|(bundles, _)| bundles.bytes()).sum();
        neurons + plan.columns.iter().flatten().flatten().map(Skippable::bytes).sum::<usize>()
    }

    /// The columns of what reads an input, if it may pay to skip some.
    pub(super) fn columns(&self, layer: usize, input: Input) -> Option<&Skippable> {
        self.plan.get()?.columns.get(layer)?[input as usize].as_ref()
    }

    /// The bundles of a layer, if `active` neurons are few enough.
    pub(super) fn bundles(&self, layer: usize, active: usize) -> Option<&Bundles> {
        let (bundles, most) = self.plan.get()?.layers.get(layer)?.as_ref()?;
        (active <= *most).then_some(bundles)
    }

    /// Whether a layer may skip neurons.
    pub(super) fn may_skip(&self, layer: usize) -> bool {
        self.plan.get().is_some_and(|plan| matches!(plan.layers.get(layer), Some(Some(_))))
    }

    /// Finds out where skipping pays, by measuring or from times known from earlier, and prepares it there. None if nothing
    /// can be skipped.
    pub(super) fn probe(
        &self,
        run: Run<'_>,
        weights: &Weights,
        known: Option<Measured>,
    ) -> Result<Option<&Measured>> {
        if self.plan.get().is_none() {
            let known = known.unwrap_or_default();
            let mut plan = Plan::default();
            self.probe_neurons(run, weights, known.neurons, &mut plan)?;
            plan.columns.resize_with(weights.layers.len(), Default::default);
            for (input, known) in Input::ALL.into_iter().zip(known.inputs) {
                self.probe_columns(run, weights, input, known, &mut plan)?;
            }
            if plan.measured == Measured::default() {
                return Ok(None);
            }
            self.plan.get_or_init(|| plan);
        }
        Ok(self.measured())
    }

    fn probe_neurons(
        &self,
        run: Run<'_>,
        weights: &Weights,
        known: Option<Times>,
        plan: &mut Plan,
    ) -> Result<()> {
        let mut layers = Vec::new();
        for (layer, thresholds) in weights.layers.iter().zip(&self.layers) {
            layers.push(if thresholds.neurons.is_empty() { None } else { bundle(run, layer)? });
        }
        let Some(first) = layers.iter().flatten().next() else { return Ok(()) };
        let times = match known.filter(Times::good) {
            Some(times) => times,
            None => measure(run, weights, &layers, first)?,
        };
        let most = times.break_even();
        let keep = |(bundles, thresholds): (Option<Bundles>, &LayerThresholds)| {
            let bundles = bundles.filter(|_| f64::from(thresholds.active) < most)?;
            let most = (most * bundles.neurons() as f64) as usize;
            Some((bundles, most))
        };
        plan.layers = layers.into_iter().zip(&self.layers).map(keep).collect();
        plan.measured.neurons = Some(times);
        Ok(())
    }

    fn probe_columns(
        &self,
        run: Run<'_>,
        weights: &Weights,
        input: Input,
        known: Option<Times>,
        plan: &mut Plan,
    ) -> Result<()> {
        let mut all = Vec::new();
        for (layer, thresholds) in weights.layers.iter().zip(&self.layers) {
            let cut = thresholds.inputs[input as usize] > 0.0;
            let linear = reader(layer, input, thresholds).filter(|_| cut);
            let columns = linear.map(|(linear, which)| Ok((linear, linear.skippable(which, run.pool)?)));
            all.push(columns.transpose()?.and_then(|(linear, columns)| Some((linear, columns?))));
        }
        let present: Vec<_> = all.iter().flatten().map(|(linear, columns)| (*linear, columns)).collect();
        if present.is_empty() {
            return Ok(());
        }
        let times = match known.filter(Times::good) {
            Some(times) => times,
            None => measure_columns(run, &present)?,
        };
        let most = times.break_even();
        for (places, columns) in plan.columns.iter_mut().zip(all).filter(|_| most > 0.0) {
            places[input as usize] = columns.map(|(_, mut columns)| {
                columns.most = (most * columns.inputs() as f64) as usize;
                columns
            });
        }
        plan.measured.inputs[input as usize] = Some(times);
        Ok(())
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

/// Times of the layers' neurons, on average. All layers are walked in turn for one kind of kernel, then for the next, so that
/// weights come from where they come from while generating; and each walk is made twice, of which the second counts.
fn measure(run: Run<'_>, weights: &Weights, layers: &[Option<Bundles>], first: &Bundles) -> Result<Times> {
    let (hidden, inner) = (first.inputs(), first.neurons());
    // A layer of another width is left out: its neighbours' times stand for it.
    let fits = |bundles: &Bundles| {
        (bundles.inputs(), bundles.neurons(), bundles.outputs()) == (hidden, inner, hidden)
    };
    let count = layers.iter().flatten().filter(|bundles| fits(bundles)).count().max(1);
    let wave = |n: usize| (0..n).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
    let (x, full) = (wave(hidden), wave(inner));
    let (mut gate_up, mut act, mut y) = (vec![0.0; 2 * inner], vec![0.0; inner], vec![0.0; hidden]);
    let (mut rounded, mut active) = (Activations::new(), Active::default());
    timed(run.pool, count, |round, share, walk| {
        let least: Vec<f32> =
            (0..inner).map(|n| if drawn(n, round, share) { 0.0 } else { f32::INFINITY }).collect();
        walk(&mut || {
            for (layer, bundles) in weights.layers.iter().zip(layers) {
                let bundles = bundles.as_ref().filter(|bundles| fits(bundles));
                let (Some(bundles), Some(mlp)) = (bundles, &layer.mlp) else { continue };
                if share.is_none() {
                    mlp.gate_up.forward(run, &x, 1, &mut rounded, &mut gate_up)?;
                    mlp.activate(run, &gate_up, &least, &mut act);
                    mlp.down.forward(run, &full, 1, &mut rounded, &mut y)?;
                } else {
                    let x = &mut Source::Given(&x);
                    mlp.gate_up.forward_parts(run, 0..1, x, 1, &mut rounded, &mut gate_up)?;
                    act.copy_from_slice(&gate_up[..inner]);
                    mlp.act(run, &mut act);
                    active.find(&full, &least);
                    mlp.skip(run, bundles, &mut active, &mut act, &mut rounded, &mut y)?;
                }
            }
            Ok(())
        })
    })
}

/// Times of linears with all columns and with some, on average.
fn measure_columns(run: Run<'_>, linears: &[(&Linear, &Skippable)]) -> Result<Times> {
    let widest = linears.iter().map(|(_, columns)| columns.inputs()).max().unwrap_or(0);
    let longest = linears.iter().map(|(linear, _)| linear.rows()).max().unwrap_or(0);
    let (mut rounded, mut active, mut y) = (Activations::new(), Vec::new(), vec![0.0; longest]);
    timed(run.pool, linears.len(), |round, share, walk| {
        let value = |n: usize| if drawn(n, round, share) { 1.0 + (n as f32 * 0.7).sin() / 2.0 } else { 0.0 };
        let x: Vec<f32> = (0..widest).map(value).collect();
        walk(&mut || {
            for (linear, columns) in linears {
                let x = &mut Source::Given(&x[..columns.inputs()]);
                let y = &mut y[..linear.rows()];
                if share.is_none() {
                    linear.forward_parts(run, columns.which(), x, 1, &mut rounded, y)?;
                } else {
                    linear.forward_skipping(run, columns, x, &mut active, &mut rounded, y)?;
                }
            }
            Ok(())
        })
    })
}

/// Whether a neuron or an input is active in a round, of a share of them or of all: which ones does not follow any pattern
/// that memory could.
fn drawn(n: usize, round: usize, share: Option<f64>) -> bool {
    let hash = (n + 7919 * round).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    share.is_none_or(|share| (hash as f64) < share * f64::from(1 << 24))
}

/// A walk over all layers.
type Walk<'a> = &'a mut dyn FnMut() -> Result<()>;

/// Median times of a layer, dense and at [`SHARES`]. `pass` gets a round, a share or none for dense, and what times a walk.
fn timed(
    pool: &Pool,
    layers: usize,
    mut pass: impl FnMut(usize, Option<f64>, &mut dyn FnMut(Walk<'_>) -> Result<()>) -> Result<()>,
) -> Result<Times> {
    let mut seconds = vec![Vec::new(); SHARES.len() + 1];
    for round in 0..ROUNDS {
        for (kind, seconds) in seconds.iter_mut().enumerate() {
            let share = kind.checked_sub(1).map(|kind| SHARES[kind]);
            pass(round, share, &mut |walk| {
                pool.region(&mut *walk)?;
                let begin = Instant::now();
                pool.region(walk)?;
                seconds.push(begin.elapsed().as_secs_f64() / layers as f64);
                Ok(())
            })?;
        }
    }
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2].max(1e-9)
    };
    let mut medians = seconds.into_iter().map(median);
    let dense = medians.next().unwrap_or(1e-9);
    Ok(Times { dense, sparse: SHARES.into_iter().zip(medians).collect() })
}

/// What was skipped.
#[derive(Debug, Clone, Copy, Default)]
pub struct Skipped {
    /// Neurons of all tokens and layers that have thresholds, in passes of one token.
    pub neurons: u64,
    /// Those that were active.
    pub active: u64,
    /// Feed-forward blocks computed by sparse kernels, of one token.
    pub sparse: u64,
    /// Feed-forward blocks computed by dense ones, of one token.
    pub dense: u64,
    /// Linears of one token of which columns were skipped.
    pub linears: u64,
}
