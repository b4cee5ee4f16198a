//! Packing a checkpoint's weights into the order in which the kernels read them.
//!
//! Plain weights keep their stored type when it is a float of 16 or 32 bits, and become f32 otherwise (GGUF's blocks hold
//! values that no 16-bit float holds exactly). Quantized weights keep their codes. Where a family fuses queries, keys and
//! values in one matrix, its rows are brought into the order all queries, all keys, all values, so that the decoder knows
//! one order only.
//!
//! The shapes were validated before; one matrix at a time is unpacked, packed and dropped.

use std::borrow::Cow;
use std::sync::Arc;

use super::blocks::{Attention, Block, Layer, Mlp, Norm};
use super::checkpoint::Checkpoint;
use super::linear::{Linear, Part};
use super::quantization::{
    ActivationScheme, Grouping, InputGrouping, Scheme, Storage, WeightScheme, ZeroPoints,
};
use super::spec::{
    AttentionSpec, BlockNorms, EmbeddingSpec, LayerSpec, LinearSpec, MlpSpec, NormSpec, Position, Qkv, Spec,
    TensorSpec,
};
use super::validate::scheme;
use crate::error::{Error, Result};
use crate::format::Dtype;
use crate::kernels::quantize::{Granularity, Rounding};
use crate::pack::{IntSource, Layout, Packed};
use crate::threads::Pool;

/// The weights of a model.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) embedding: Arc<Packed>,
    pub(super) embedding_norm: Option<Norm>,
    pub(super) project_in: Option<Linear>,
    pub(super) positions: Option<Arc<Packed>>,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Option<Norm>,
    pub(super) project_out: Option<Linear>,
    pub(super) head: Linear,
}

impl Weights {
    /// Reads and packs the weights of a validated specification.
    pub(super) fn load(spec: &Spec, checkpoint: &Checkpoint, pool: &Pool) -> Result<Self> {
        let load = Loader { checkpoint, pool };
        let embedding = Arc::new(load.table(&spec.embedding)?);
        let head = if spec.tied {
            Linear::new(vec![load.tied_head(spec, &embedding)], None)
        } else {
            load.linear(&[&spec.head], None)?
        };
        let positions = match &spec.position {
            Position::Learned { table, .. } => Some(Arc::new(load.table(table)?)),
            Position::Rope | Position::Alibi => None,
        };
        let optional = |linear: &Option<LinearSpec>| {
            linear.as_ref().map(|linear| load.linear(&[linear], None)).transpose()
        };
        Ok(Self {
            embedding_norm: load.norm(spec.embedding_norm.as_ref())?,
            project_in: optional(&spec.project_in)?,
            positions,
            layers: spec
                .layers
                .iter()
                .map(|layer| load.layer(layer, spec.position == Position::Alibi))
                .collect::<Result<_>>()?,
            final_norm: load.norm(spec.final_norm.as_ref())?,
            project_out: optional(&spec.project_out)?,
            head,
            embedding,
        })
    }

    /// All packed matrices, a shared one once.
    pub(super) fn matrices(&self) -> Vec<&Arc<Packed>> {
        let mut list = vec![&self.embedding];
        list.extend(&self.positions);
        let outer = [&self.project_in, &self.project_out];
        list.extend(outer.into_iter().flatten().flat_map(Linear::weights));
        list.extend(self.layers.iter().flat_map(Layer::matrices));
        list.extend(self.head.weights().filter(|head| !Arc::ptr_eq(head, &self.embedding)));
        list
    }

    /// Whether any matrix holds integer codes.
    pub(super) fn quantized(&self) -> bool {
        self.matrices().iter().any(|matrix| matches!(matrix.layout(), Layout::W4 | Layout::W8))
    }
}

/// Reads and packs single parts of a checkpoint.
pub(super) struct Loader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) pool: &'a Pool,
}

impl Loader<'_> {
    /// A layer; `alibi` for heads that have slopes.
    pub(super) fn layer(&self, layer: &LayerSpec, alibi: bool) -> Result<Layer> {
        let attention = layer.attention.as_ref();
        Ok(Layer {
            attention: attention.map(|attention| self.attention(attention, alibi)).transpose()?,
            attention_block: self.block(&layer.attention_norms)?,
            mlp: layer.mlp.as_ref().map(|mlp| self.mlp(mlp)).transpose()?,
            mlp_block: self.block(&layer.mlp_norms)?,
        })
    }

    /// The attention of a layer.
    fn attention(&self, attention: &AttentionSpec, alibi: bool) -> Result<Attention> {
        let row_map = match &attention.qkv {
            Qkv::Fused { per_head: true, .. } => Some(per_head_rows(attention)),
            _ => None,
        };
        let (q_norm, k_norm) = attention.qk_norms.as_ref().map(|(q, k)| (q, k)).unzip();
        Ok(Attention {
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            groups: attention.groups.clone(),
            head_dim: attention.head_dim,
            scale: attention.scale,
            causal: attention.causal,
            window: attention.window,
            softcap: attention.softcap,
            slopes: alibi.then(|| Spec::alibi_slopes(attention.heads)),
            rope: attention.rope,
            qkv: self.linear(&attention.qkv.linears(), row_map.as_deref())?,
            q_norm: self.norm(q_norm)?,
            k_norm: self.norm(k_norm)?,
            out: self.linear(&[&attention.out], None)?,
        })
    }

    /// A feed-forward block.
    pub(super) fn mlp(&self, mlp: &MlpSpec) -> Result<Mlp> {
        let gate_up: Vec<&LinearSpec> = mlp.gate.iter().chain([&mlp.up]).collect();
        Ok(Mlp {
            inner: mlp.up.rows,
            gated: mlp.gate.is_some(),
            activation: mlp.activation,
            gate_up: self.linear(&gate_up, None)?,
            down: self.linear(&[&mlp.down], None)?,
        })
    }

    /// All values of a tensor.
    pub(super) fn tensor(&self, tensor: &TensorSpec) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        let (rows, _) = self.checkpoint.tensor(&tensor.name)?.matrix();
        self.checkpoint.read_f32(&tensor.name, 0..rows, &mut values)?;
        Ok(values)
    }

    fn block(&self, norms: &BlockNorms) -> Result<Block> {
        Ok(Block {
            pre: self.norm(norms.pre.as_ref())?,
            post: self.norm(norms.post.as_ref())?,
            after: self.norm(norms.after.as_ref())?,
            scale: norms.scale.as_ref().map(|scale| self.tensor(scale)).transpose()?,
            residual_is_normed: norms.residual_is_normed,
        })
    }

    /// A norm, if there is one.
    pub(super) fn norm(&self, norm: Option<&NormSpec>) -> Result<Option<Norm>> {
        let Some(norm) = norm else { return Ok(None) };
        let mut gain = vec![1.0; norm.dim];
        let mut bias = None;
        if norm.affine {
            self.checkpoint.read_f32(&format!("{}.weight", norm.module), 0..norm.dim, &mut gain)?;
            if norm.plus_one {
                for gain in &mut gain {
                    *gain += 1.0;
                }
            }
        }
        if norm.has_bias() {
            self.checkpoint.read_f32(
                &format!("{}.bias", norm.module),
                0..norm.dim,
                bias.insert(Vec::new()),
            )?;
        }
        Ok(Some(Norm { kind: norm.kind, eps: norm.eps, gain, bias }))
    }

    /// The matrices of `linears` side by side; `row_map` brings the rows of a single one into order.
    pub(super) fn linear(&self, linears: &[&LinearSpec], row_map: Option<&[u32]>) -> Result<Linear> {
        let mut parts = Vec::new();
        let mut bias: Option<Vec<f32>> = None;
        let before = |parts: &[Part]| parts.iter().map(|part| part.weight.rows()).sum();
        for linear in linears {
            if linear.bias {
                let mut own = Vec::new();
                self.checkpoint.read_f32(&format!("{}.bias", linear.module), 0..linear.rows, &mut own)?;
                if let Some(map) = row_map {
                    own = map.iter().map(|row| own[*row as usize]).collect();
                }
                // A part without a bias beside one with: zeros.
                let all = bias.get_or_insert_default();
                all.resize(before(&parts), 0.0);
                all.extend(own);
            }
            parts.push(self.part(linear, row_map)?);
        }
        if let Some(bias) = &mut bias {
            bias.resize(before(&parts), 0.0);
        }
        Ok(Linear::new(parts, bias))
    }

    fn part(&self, linear: &LinearSpec, row_map: Option<&[u32]>) -> Result<Part> {
        let shape = [linear.rows, linear.cols];
        let Some(scheme) = scheme(self.checkpoint.quantization(), &linear.module, linear.classes()) else {
            let name = linear.weight();
            let exchanged = self.checkpoint.tensor(&name)?.exchanged(linear);
            let weight = self.float(&name, shape, exchanged, row_map)?;
            return Ok(Part { weight: Arc::new(weight), rounding: None });
        };
        let weight = self.integer(&linear.module, shape, scheme, row_map)?;
        let rounding = match scheme.activations {
            Some(activations) => Some(self.rounding(&linear.module, activations, &weight)?),
            None => None,
        };
        Ok(Part { weight: Arc::new(weight), rounding })
    }

    fn table(&self, table: &EmbeddingSpec) -> Result<Packed> {
        let shape = [table.rows, table.cols];
        match scheme(self.checkpoint.quantization(), &table.module, &["Embedding"]) {
            Some(scheme) => self.integer(&table.module, shape, scheme, None),
            None => self.float(&table.weight(), shape, false, None),
        }
    }

    /// The head that is the embedding. With quantized weights its inputs are rounded as those of the other linears.
    fn tied_head(&self, spec: &Spec, embedding: &Arc<Packed>) -> Part {
        let mut rounding = None;
        if let Some(quantization) = self.checkpoint.quantization()
            && matches!(embedding.layout(), Layout::W4 | Layout::W8)
        {
            // A group of the weight's own width, whatever width the linears have.
            let found = quantization.tied_activations(&spec.embedding.module, &["Embedding"]);
            rounding = found.map(|ActivationScheme { bits, grouping }| {
                let token = grouping == InputGrouping::Token;
                Rounding { bits, per: if token { Granularity::Token } else { Granularity::Group } }
            });
        }
        Part { weight: Arc::clone(embedding), rounding }
    }

    /// A plain matrix.
    fn float(
        &self,
        name: &str,
        [rows, cols]: [usize; 2],
        exchanged: bool,
        row_map: Option<&[u32]>,
    ) -> Result<Packed> {
        let packed = if let Some((dtype, bits)) = self.checkpoint.halves(name, exchanged)? {
            let bits = reorder(bits, cols, row_map);
            let layout = if dtype == Dtype::F16 { Layout::F16 } else { Layout::Bf16 };
            Packed::from_half(rows, cols, &bits, layout, self.pool)
        } else {
            let values = self.checkpoint.read_all(name, exchanged, cols, self.pool)?;
            Packed::from_f32(rows, cols, &reorder(values.into(), cols, row_map), self.pool)
        };
        self.checkpoint.release(name);
        packed
    }

    /// A quantized matrix.
    fn integer(
        &self,
        module: &str,
        [rows, cols]: [usize; 2],
        scheme: Scheme,
        row_map: Option<&[u32]>,
    ) -> Result<Packed> {
        let name = |part: &str| format!("{module}.{part}");
        let weights = scheme.weights;
        let group = match weights.grouping {
            Grouping::Columns(group) => group,
            Grouping::Row | Grouping::Tensor => cols,
        };
        let groups = cols / group;
        let mut scales = Vec::new();
        let scale_name = name("weight_scale");
        let (scale_rows, _) = self.checkpoint.tensor(&scale_name)?.matrix();
        self.checkpoint.read_f32(&scale_name, 0..scale_rows, &mut scales)?;
        if weights.grouping == Grouping::Tensor {
            scales = vec![scales[0]; rows];
        }
        let zeros = self.zeros(module, rows, groups, weights)?;
        let stored = match weights.storage {
            Storage::Packed => name("weight_packed"),
            Storage::Bytes => name("weight"),
        };
        let bytes = self.bytes(&stored)?;
        let converted; // one code a byte, or two, with the sign bit turned
        let (codes, row_bytes) = match (weights.storage, weights.bits) {
            (Storage::Packed, bits) => (bytes, cols.div_ceil((32 / bits) as usize) * 4),
            (Storage::Bytes, 8) => {
                converted = bytes.iter().map(|byte| byte ^ 0x80).collect::<Vec<_>>();
                (converted.as_slice(), cols)
            }
            (Storage::Bytes, _) => {
                converted = nibbles(&stored, bytes, cols)?;
                (converted.as_slice(), cols.div_ceil(2))
            }
        };
        let source = IntSource {
            name: &stored,
            rows,
            cols,
            bits: weights.bits,
            group,
            codes,
            row_bytes,
            scales: &scales,
            zeros: zeros.as_deref(),
            row_map,
        };
        let packed = Packed::from_int(&source, self.pool);
        self.checkpoint.release(&stored);
        packed
    }

    /// The zero points `[rows, groups]` as tiles hold them (see [`IntSource::zeros`]); none of symmetric weights.
    fn zeros(
        &self,
        module: &str,
        rows: usize,
        groups: usize,
        weights: WeightScheme,
    ) -> Result<Option<Vec<u8>>> {
        let name = format!("{module}.weight_zero_point");
        let (middle, units) = if weights.bits == 4 { (8, 16) } else { (128, 1) };
        let found: Vec<u8> = match weights.zeros {
            ZeroPoints::Middle => return Ok(None),
            ZeroPoints::Packed => {
                // Down the columns: word w of a column holds rows 8 w .. 8 w + 8 (or 4 of them), low bits first.
                let bytes = self.bytes(&name)?;
                let per_word = (32 / weights.bits) as usize;
                let code = |row: usize, group: usize| {
                    let word = (row / per_word * groups + group) * 4;
                    let byte = bytes[word + row % per_word * weights.bits as usize / 8];
                    if weights.bits == 8 { byte } else { (byte >> (row % 2 * 4) & 15) * units }
                };
                (0..rows).flat_map(|row| (0..groups).map(move |group| code(row, group))).collect()
            }
            ZeroPoints::Bytes => {
                let unit = |byte: &u8| (i32::from(*byte as i8) + middle) * i32::from(units);
                let inside = |byte: &u8| u8::try_from(unit(byte)).map_err(|_| f32::from(*byte as i8));
                let found = self.bytes(&name)?.iter().map(inside).collect::<Result<_, _>>();
                found.map_err(|value| self.bad_zero(&name, "codes less the middle one", value))?
            }
            ZeroPoints::Fractions => {
                let mut values = Vec::new();
                self.checkpoint.read_f32(&name, 0..rows, &mut values)?;
                let inside = |value: &f32| {
                    let unit = (value + middle as f32) * f32::from(units);
                    let whole = unit as u8;
                    if f32::from(whole) == unit { Ok(whole) } else { Err(*value) }
                };
                let found = values.iter().map(inside).collect::<Result<_, _>>();
                found.map_err(|value| self.bad_zero(&name, "multiples of 1/16 from -8 to 7.9375", value))?
            }
        };
        // One for all of a tensor, or one for each group.
        Ok(Some(if found.len() == rows * groups { found } else { vec![found[0]; rows * groups] }))
    }

    /// How the inputs of a quantized linear are rounded: kernels share groups between weights and activations.
    fn rounding(&self, module: &str, activations: ActivationScheme, weight: &Packed) -> Result<Rounding> {
        let per = match activations.grouping {
            InputGrouping::Token => Granularity::Token,
            InputGrouping::Group(group) if group == weight.group() || group == weight.cols() => {
                Granularity::Group
            }
            InputGrouping::Group(group) => {
                return Err(Error::unsupported(
                    format!("{module}: activations in groups of {group} columns"),
                    format!("groups as wide as the weight's, {}, or one scale a token are", weight.group()),
                ));
            }
            InputGrouping::Tensor => {
                let name = format!("{module}.input_scale");
                let mut scale = Vec::new();
                let (rows, _) = self.checkpoint.tensor(&name)?.matrix();
                self.checkpoint.read_f32(&name, 0..rows, &mut scale)?;
                match scale[..] {
                    [scale] if scale >= f32::MIN_POSITIVE && scale.is_finite() => Granularity::Tensor(scale),
                    _ => {
                        let found = format!("{scale:?}");
                        return Err(Error::format(
                            self.checkpoint.path(),
                            name,
                            "one positive number",
                            found,
                        ));
                    }
                }
            }
        };
        Ok(Rounding { bits: activations.bits, per })
    }

    fn bad_zero(&self, name: &str, expected: &str, found: f32) -> Error {
        Error::format(self.checkpoint.path(), name, expected, found.to_string())
    }

    fn bytes(&self, name: &str) -> Result<&[u8]> {
        let bytes = self.checkpoint.raw(name)?;
        Ok(bytes.expect("tensors of a quantized folder are stored as they are named"))
    }
}

/// Rows of `cols` values, row `r` taken from row `row_map[r]`.
pub(super) fn reorder<'a, T: Copy>(
    values: Cow<'a, [T]>,
    cols: usize,
    row_map: Option<&[u32]>,
) -> Cow<'a, [T]> {
    match row_map {
        None => values,
        Some(map) => map.iter().flat_map(|row| &values[*row as usize * cols..][..cols]).copied().collect(),
    }
}

/// Rows `[q, k, v][head][d]` of a matrix stored `[head][q, k, v][d]`.
fn per_head_rows(attention: &AttentionSpec) -> Vec<u32> {
    let (heads, dim) = (attention.heads, attention.head_dim);
    let row = |part: usize, head: usize, i: usize| ((head * 3 + part) * dim + i) as u32;
    (0..3)
        .flat_map(|part| (0..heads).flat_map(move |head| (0..dim).map(move |i| row(part, head, i))))
        .collect()
}

/// Signed 4-bit codes, one a byte, as unsigned ones, two a byte.
fn nibbles(name: &str, bytes: &[u8], cols: usize) -> Result<Vec<u8>> {
    let code = |byte: u8| {
        let value = byte as i8;
        if (-8..8).contains(&value) {
            return Ok((value + 8) as u8);
        }
        Err(Error::argument(name, "codes from -8 to 7", value))
    };
    let mut packed = Vec::with_capacity(bytes.len().div_ceil(2));
    for row in bytes.chunks_exact(cols) {
        for pair in row.chunks(2) {
            let high = if let [_, high] = pair { code(*high)? } else { 8 };
            packed.push(code(pair[0])? | high << 4);
        }
    }
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_packed_low_first() {
        let bytes: Vec<u8> = [-8_i8, 7, 0, 1, -1, 3].iter().map(|v| *v as u8).collect();
        assert_eq!(nibbles("w", &bytes, 3).expect("in range"), [0xf0, 0x88, 0x79, 0x8b]);
        assert!(nibbles("w", &[9], 1).is_err());
    }

    #[test]
    fn rows_are_gathered() {
        assert_eq!(*reorder((&[1, 2, 3, 4, 5, 6]).into(), 2, Some(&[2, 0])), [5, 6, 1, 2]);
    }
}
