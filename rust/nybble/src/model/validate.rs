//! Does the configuration tell the truth about the tensors?
//!
//! Everything a configuration claims is held against the tensors that are there, before memory is taken for any of it, and
//! every contradiction is reported, not only the first. After [`validate`] a size in a [`Spec`] is a size of the file.

use super::checkpoint::{Checkpoint, Tensor};
use super::quantization::{Grouping, InputGrouping, Quantization, Scheme, Storage, ZeroPoints};
use super::spec::{EmbeddingSpec, Inventory, LinearSpec, NormSpec, Spec};
use crate::error::{Error, Result};
use crate::format::Dtype;
use crate::pack::TILE_K;

/// Problems that a message lists; a model with a wrong width has one a tensor.
const SHOWN: usize = 40;

/// Types of scales.
const FLOATS: [Dtype; 3] = [Dtype::F16, Dtype::Bf16, Dtype::F32];

/// Shapes of the one scale of a tensor.
const PER_TENSOR: &[&[usize]] = &[&[], &[1], &[1, 1]];

/// Reports everything in which `spec` and the tensors disagree.
pub fn validate(spec: &Spec, checkpoint: &Checkpoint) -> Result<()> {
    let mut check = Check { checkpoint, problems: Vec::new(), more: 0 };
    check.all(&spec.inventory());
    if spec.tied && (spec.head.rows, spec.head.cols) != (spec.embedding.rows, spec.embedding.cols) {
        check.problem("tie_word_embeddings: expected a head of the embedding's shape".into());
    }
    check.finish()
}

/// Reports everything in which a list of weights and the tensors disagree.
pub fn validate_weights(weights: &Inventory<'_>, checkpoint: &Checkpoint) -> Result<()> {
    let mut check = Check { checkpoint, problems: Vec::new(), more: 0 };
    check.all(weights);
    check.finish()
}

struct Check<'a> {
    checkpoint: &'a Checkpoint,
    problems: Vec<String>,
    more: usize,
}

impl Check<'_> {
    fn problem(&mut self, text: String) {
        if self.problems.len() < SHOWN { self.problems.push(text) } else { self.more += 1 }
    }

    fn finish(mut self) -> Result<()> {
        if self.problems.is_empty() {
            return Ok(());
        }
        if self.more > 0 {
            self.problems.push(format!("and {} more", self.more));
        }
        Err(Error::Config {
            file: self.checkpoint.config_file().display().to_string(),
            problems: self.problems,
        })
    }

    fn all(&mut self, weights: &Inventory<'_>) {
        weights.embeddings.iter().for_each(|table| self.embedding(table));
        weights.linears.iter().for_each(|linear| self.linear(linear));
        weights.norms.iter().for_each(|norm| self.norm(norm));
        weights.tensors.iter().for_each(|tensor| self.floats(&tensor.name, &tensor.shape));
    }

    fn linear(&mut self, linear: &LinearSpec) {
        let shape = [linear.rows, linear.cols];
        self.matrix(&linear.module, linear.classes(), shape, linear.transposed);
        let found = scheme(self.checkpoint.quantization(), &linear.module, linear.classes());
        let inputs = found.and_then(|scheme| scheme.activations);
        if inputs.is_some_and(|inputs| inputs.grouping == InputGrouping::Tensor) {
            self.tensor(&format!("{}.input_scale", linear.module), PER_TENSOR, &FLOATS);
        }
        if linear.bias {
            self.floats(&format!("{}.bias", linear.module), &[linear.rows]);
        }
    }

    fn embedding(&mut self, table: &EmbeddingSpec) {
        self.matrix(&table.module, &["Embedding"], [table.rows, table.cols], false);
    }

    fn norm(&mut self, norm: &NormSpec) {
        if norm.affine {
            self.floats(&format!("{}.weight", norm.module), &[norm.dim]);
        }
        if norm.has_bias() {
            self.floats(&format!("{}.bias", norm.module), &[norm.dim]);
        }
    }

    fn matrix(&mut self, module: &str, classes: &[&str], shape: [usize; 2], transposed: bool) {
        let name = |part: &str| format!("{module}.{part}");
        let packed = self.checkpoint.tensors().contains_key(&name("weight_packed"));
        let scheme = self.checkpoint.quantization().and_then(|all| all.scheme(module, classes));
        match scheme {
            Some(scheme) => self.quantized(module, shape, scheme),
            None if packed => {
                self.problem(format!(
                    "{}: no group of quantization_config names this module",
                    name("weight_packed")
                ));
            }
            None if transposed => self.floats(&name("weight"), &[shape[1], shape[0]]),
            None => self.floats(&name("weight"), &shape),
        }
    }

    fn quantized(&mut self, module: &str, [rows, cols]: [usize; 2], scheme: Scheme) {
        let name = |part: &str| format!("{module}.{part}");
        let weights = scheme.weights;
        let groups = match weights.grouping {
            Grouping::Columns(group) if group < cols && !group.is_multiple_of(TILE_K) => {
                return self.problem(format!(
                    "{module}: expected a group_size that is a multiple of 32, found {group}"
                ));
            }
            Grouping::Columns(group) if !cols.is_multiple_of(group) => {
                return self.problem(format!(
                    "{module}: expected a group_size that divides {cols} columns, found {group}"
                ));
            }
            Grouping::Columns(group) => cols / group,
            Grouping::Row | Grouping::Tensor => 1,
        };
        let per_word = (32 / weights.bits) as usize;
        let ints = [Dtype::I32, Dtype::U32];
        match weights.storage {
            Storage::Packed => {
                self.tensor(&name("weight_packed"), &[&[rows, cols.div_ceil(per_word)]], &ints);
                self.stated_shape(&name("weight_shape"), [rows, cols]);
            }
            Storage::Bytes => self.tensor(&name("weight"), &[&[rows, cols]], &[Dtype::I8]),
        }
        let per_row: &[&[usize]] = &[&[rows, groups]];
        let per_channel: &[&[usize]] = &[&[rows, 1], &[rows]];
        let shapes = match weights.grouping {
            Grouping::Columns(_) => per_row,
            Grouping::Row => per_channel,
            Grouping::Tensor => PER_TENSOR,
        };
        self.tensor(&name("weight_scale"), shapes, &FLOATS);
        let zeros = name("weight_zero_point");
        match weights.zeros {
            ZeroPoints::Middle => {}
            ZeroPoints::Packed => self.tensor(&zeros, &[&[rows.div_ceil(per_word), groups]], &ints),
            ZeroPoints::Bytes => self.tensor(&zeros, shapes, &[Dtype::I8]),
            ZeroPoints::Fractions => self.tensor(&zeros, shapes, &FLOATS),
        }
        self.identity(&name("weight_g_idx"), cols, cols / groups.max(1));
    }

    /// A float tensor of that shape.
    fn floats(&mut self, name: &str, shape: &[usize]) {
        let Some(tensor) = self.find(name) else { return };
        if !tensor.dtype.is_float() {
            let found = tensor.dtype;
            self.problem(format!("{name}: expected a float type, found {found}"));
        }
        self.shape(name, &[shape]);
    }

    /// A tensor of one of those shapes and types.
    fn tensor(&mut self, name: &str, shapes: &[&[usize]], types: &[Dtype]) {
        let Some(tensor) = self.find(name) else { return };
        if !types.contains(&tensor.dtype) {
            let names: Vec<_> = types.iter().map(|dtype| dtype.name()).collect();
            let found = tensor.dtype;
            self.problem(format!("{name}: expected type {}, found {found}", names.join(" or ")));
        }
        self.shape(name, shapes);
    }

    fn shape(&mut self, name: &str, shapes: &[&[usize]]) {
        let Some(tensor) = self.checkpoint.tensors().get(name) else { return };
        if !shapes.contains(&tensor.shape.as_slice()) {
            self.problem(format!("{name}: expected shape {:?}, found {:?}", shapes[0], tensor.shape));
        }
    }

    fn find(&mut self, name: &str) -> Option<Tensor> {
        let tensor = self.checkpoint.tensors().get(name).cloned();
        if tensor.is_none() {
            self.problem(format!("{name}: expected this tensor, found none"));
        }
        tensor
    }

    /// The integers of a small tensor that may be absent.
    fn integers(&mut self, name: &str, len: usize) -> Option<Vec<i64>> {
        let tensor = self.checkpoint.tensors().get(name)?;
        let bytes = self.checkpoint.raw(name).ok().flatten()?;
        let values: Option<Vec<i64>> = match tensor.dtype {
            Dtype::I64 => Some(chunks(bytes).map(i64::from_le_bytes).collect()),
            Dtype::I32 => Some(chunks(bytes).map(|word| i32::from_le_bytes(word).into()).collect()),
            _ => None,
        };
        let values = values.filter(|values| values.len() == len);
        if values.is_none() {
            let found = format!("{} {:?}", tensor.dtype, tensor.shape);
            self.problem(format!("{name}: expected {len} integers, found {found}"));
        }
        values
    }

    /// `weight_shape` repeats the shape of the weight.
    fn stated_shape(&mut self, name: &str, shape: [usize; 2]) {
        if self.find(name).is_some()
            && let Some(found) = self.integers(name, 2)
            && found.iter().zip(shape).any(|(found, wanted)| usize::try_from(*found).ok() != Some(wanted))
        {
            self.problem(format!("{name}: expected {shape:?}, found {found:?}"));
        }
    }

    /// Columns may have been assigned to groups in another order; only the usual one is read.
    fn identity(&mut self, name: &str, cols: usize, group: usize) {
        if let Some(found) = self.integers(name, cols)
            && found.iter().enumerate().any(|(i, g)| *g != -1 && *g != (i / group.max(1)) as i64)
        {
            self.problem(format!(
                "{name}: columns regrouped by activation order (actorder) are not supported"
            ));
        }
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|chunk| *chunk.first_chunk().expect("chunks of N bytes"))
}

/// What a module's weight is stored as, for the loader.
pub(super) fn scheme(quantization: Option<&Quantization>, module: &str, classes: &[&str]) -> Option<Scheme> {
    quantization.and_then(|all| all.scheme(module, classes))
}
