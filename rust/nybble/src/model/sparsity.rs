//! Activation sparsity at work: what is taken for zero, and where skipping it saves time.
//!
//! Thresholds are part of a model, as its weights are: a value at or below its threshold counts as 0 in prompts, in drafts
//! that are verified and in tokens one by one, whichever kernel runs. Which kernel that is decides the clock alone: the
//! sparse ones give the same bits as the dense ones do for the same zeros. [`Sparsity::probe`] measures both once for a
//! model and machine, then whole tokens with what pays part by part; until then, and where it does not pay, dense ones run.
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

mod probe;
mod tokens;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use self::probe::Candidates;
use super::Model;
use super::linear::{Run, Skippable};
use super::load::Weights;
use super::spec::{AttentionSpec, Qkv, Spec};
use crate::error::{Error, Result};
use crate::format::safetensors::SafeTensors;
use crate::format::{Access, Dtype};
use crate::pack::Bundles;

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
///
/// This, and the thresholds of neurons, is what is left to do where nothing is skipped. It costs nothing that can be measured:
/// tokens of SmolLM2-135M took 0.997 to 1.003 times as long as without thresholds (one thread, medians of 40 turns).
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
    /// How many times as fast at least three of four whole tokens are with all that pays by these times; none if nothing does.
    /// Unlike the times it belongs to these thresholds.
    #[serde(default)]
    pub speedup: Option<f64>,
    /// Whether the turns that the speed-up is from were too scattered to tell whether it is enough: another time it may be
    /// other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scattered: bool,
}

/// Dense kernels must take this much longer.
const WORTHWHILE: f64 = 1.05;

/// With less than this speed-up of three of four whole tokens nothing is skipped.
const WORTHWHILE_TOKENS: f64 = 1.02;

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

impl Plan {
    /// Whether anything may be skipped.
    fn skips(&self) -> bool {
        self.layers.iter().any(Option::is_some) || self.columns.iter().flatten().any(Option::is_some)
    }
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

    /// How many times as fast at least three of four whole tokens were with what pays part by part; if that was too little,
    /// nothing is skipped.
    pub fn speedup(&self) -> Option<f64> {
        self.measured()?.speedup
    }

    /// Whether the turns that the speed-up is from were too scattered to tell whether it is enough.
    pub fn scattered(&self) -> bool {
        self.measured().is_some_and(|measured| measured.scattered)
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
    pub(super) fn probe(&self, model: &Model, known: Option<Measured>) -> Result<Option<&Measured>> {
        if self.plan.get().is_none() {
            let (run, weights) = (model.run(), &model.weights);
            let layers = weights.layers.iter().zip(&self.layers);
            let layers = layers.map(|(layer, thresholds)| Candidates::of(run, layer, thresholds));
            let layers = layers.collect::<Result<Vec<_>>>()?;
            let Some(measured) = times(run, weights, &layers, known.unwrap_or_default())? else {
                return Ok(None);
            };
            let plan = self.check(model, self.keep(layers, measured))?;
            self.plan.get_or_init(|| plan);
        }
        Ok(self.measured())
    }

    /// The plan, or one that skips nothing where whole tokens are not faster with it.
    fn check(&self, model: &Model, mut plan: Plan) -> Result<Plan> {
        if !plan.skips() {
            (plan.measured.speedup, plan.measured.scattered) = (None, false);
            return Ok(plan);
        }
        let good = |speedup: &f64| !plan.measured.scattered && speedup.is_finite() && *speedup > 0.0;
        let known = plan.measured.speedup.filter(good);
        let (speedup, scattered) = if let Some(speedup) = known {
            (speedup, false)
        } else {
            let with = |plan| Arc::new(Self { layers: self.layers.clone(), plan });
            let chosen = with(OnceLock::from(plan));
            let ratios = tokens::ratios(model, with(OnceLock::new()), Arc::clone(&chosen))?;
            plan = Arc::into_inner(chosen).and_then(|chosen| chosen.plan.into_inner()).unwrap_or_default();
            tokens::judge(ratios, WORTHWHILE_TOKENS)
        };
        (plan.measured.speedup, plan.measured.scattered) = (Some(speedup), scattered);
        if speedup < WORTHWHILE_TOKENS {
            plan = Plan { measured: plan.measured, ..Plan::default() };
        }
        Ok(plan)
    }

    /// What pays by these times.
    fn keep(&self, layers: Vec<Candidates>, measured: Measured) -> Plan {
        let most = |times: &Option<Times>| times.as_ref().map_or(0.0, Times::break_even);
        let neurons = most(&measured.neurons);
        let inputs = measured.inputs.each_ref().map(most);
        let mut plan = Plan { measured, ..Plan::default() };
        for (layer, thresholds) in layers.into_iter().zip(&self.layers) {
            let Candidates { neurons: bundles, columns } = layer;
            plan.layers.push(bundles.filter(|_| f64::from(thresholds.active) < neurons).map(|bundles| {
                let most = (neurons * bundles.neurons() as f64) as usize;
                (bundles, most)
            }));
            let mut most = inputs.iter();
            plan.columns.push(columns.map(|columns| {
                let most = *most.next()?;
                let mut columns = columns.filter(|_| most > 0.0)?;
                columns.most = (most * columns.inputs() as f64) as usize;
                Some(columns)
            }));
        }
        plan
    }
}

/// The times of what may be skipped: those known, if they have all of it, or measured ones, which leave open what they make of
/// tokens. None where nothing may be.
fn times(
    run: Run<'_>,
    weights: &Weights,
    layers: &[Candidates],
    known: Measured,
) -> Result<Option<Measured>> {
    let neurons = layers.iter().any(|layer| layer.neurons.is_some());
    let inputs: [bool; INPUTS] =
        std::array::from_fn(|input| layers.iter().any(|layer| layer.columns[input].is_some()));
    if !neurons && !inputs.contains(&true) {
        return Ok(None);
    }
    let good = |wanted: bool, times: &Option<Times>| !wanted || times.as_ref().is_some_and(Times::good);
    let all = good(neurons, &known.neurons)
        && inputs.iter().zip(&known.inputs).all(|(wanted, times)| good(*wanted, times));
    if !all {
        return probe::measure(run, weights, layers).map(Some);
    }
    let Measured { neurons: of_neurons, inputs: of_inputs, .. } = known;
    let mut wanted = inputs.into_iter();
    let of_inputs = of_inputs.map(|times| times.filter(|_| wanted.next() == Some(true)));
    Ok(Some(Measured { neurons: of_neurons.filter(|_| neurons), inputs: of_inputs, ..known }))
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
