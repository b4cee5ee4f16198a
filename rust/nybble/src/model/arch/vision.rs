//! What the families of image encoders share: sizes under the same keys, and layers that differ in their names only.

use serde_json::Value;

use crate::model::config::{Reader, brief};
use crate::model::spec::{
    Activation, AttentionSpec, BlockNorms, LayerSpec, LinearSpec, MlpSpec, NormKind, NormSpec, Qkv, Role,
    TensorSpec,
};

/// Most sides of an image and of a patch; positions for larger ones are learned by nobody.
const MAX_SIDE: u64 = 1 << 16;

/// The sizes of an encoder.
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) inner: usize,
    pub(super) channels: usize,
    pub(super) patch: [usize; 2],
    pub(super) image: [usize; 2],
    pub(super) eps: f32,
    pub(super) activation: Activation,
    /// Whether queries, keys and values have biases.
    pub(super) qkv_bias: bool,
}

impl Sizes {
    /// Reads them; `inner` is the feed-forward width where the family has it under another key.
    pub(super) fn read(
        c: &mut Reader<'_>,
        eps: f64,
        activation: &'static str,
        inner: impl FnOnce(&mut Reader<'_>, usize) -> usize,
    ) -> Self {
        let hidden = c.size("hidden_size");
        let heads = c.size("num_attention_heads");
        c.divides(("hidden_size", hidden), ("num_attention_heads", heads));
        let (patch, image) = (pair(c, "patch_size", 16), pair(c, "image_size", 224));
        if patch[0] > image[0] || patch[1] > image[1] {
            c.problem(format!("patch_size: expected at most the image_size {image:?}, found {patch:?}"));
        }
        let name = c.text_or("hidden_act", activation);
        let activation = Activation::parse(name).filter(|a| *a != Activation::Silu).unwrap_or_else(|| {
            c.problem(format!("hidden_act: expected relu or a gelu, found {name:?}"));
            Activation::GeluErf
        });
        Self {
            hidden,
            layers: c.layers("num_hidden_layers"),
            heads,
            inner: inner(c, hidden),
            channels: c.size_or("num_channels", 3),
            patch,
            image,
            eps: c.number_or("layer_norm_eps", eps) as f32,
            activation,
            qkv_bias: c.flag_or("qkv_bias", true),
        }
    }

    /// Patches of an image.
    pub(super) fn patches(&self) -> usize {
        (self.image[0] / self.patch[0]).saturating_mul(self.image[1] / self.patch[1])
    }

    pub(super) fn norm(&self, module: String) -> NormSpec {
        NormSpec {
            module,
            kind: NormKind::Layer,
            dim: self.hidden,
            eps: self.eps,
            plus_one: false,
            affine: true,
        }
    }

    /// The patch embedding's weight.
    pub(super) fn patch_weight(&self, module: &str) -> TensorSpec {
        let [height, width] = self.patch;
        tensor(format!("{module}.weight"), &[self.hidden, self.channels, height, width])
    }

    /// The feed-forward block of two linears.
    pub(super) fn mlp(&self, up: String, down: String) -> MlpSpec {
        MlpSpec {
            gate: None,
            up: linear(up, self.inner, self.hidden, true, Role::GateUp),
            down: linear(down, self.hidden, self.inner, true, Role::Down),
            activation: self.activation,
        }
    }

    /// The layers, whose modules `at(layer, name)` names.
    pub(super) fn layers(&self, names: &Names, at: &dyn Fn(usize, &str) -> String) -> Vec<LayerSpec> {
        let head_dim = (self.hidden / self.heads).max(1);
        let layer = |i: usize| {
            let project =
                |part: &str| linear(at(i, part), self.hidden, self.hidden, self.qkv_bias, Role::Qkv);
            let norms = |which: usize| {
                let norm = Some(self.norm(at(i, names.norms[which])));
                let scale = names.scales.map(|scales| tensor(at(i, scales[which]), &[self.hidden]));
                let plain = BlockNorms { scale, ..BlockNorms::default() };
                if names.norms_behind {
                    BlockNorms { after: norm, ..plain }
                } else {
                    BlockNorms { pre: norm, ..plain }
                }
            };
            LayerSpec {
                attention: Some(AttentionSpec {
                    heads: self.heads,
                    kv_heads: self.heads,
                    groups: None,
                    head_dim,
                    scale: (1.0 / (head_dim as f64).sqrt()) as f32,
                    causal: false,
                    window: None,
                    softcap: None,
                    rope: None,
                    qkv: Qkv::Separate {
                        q: project(names.qkv[0]),
                        k: project(names.qkv[1]),
                        v: project(names.qkv[2]),
                    },
                    qk_norms: None,
                    out: linear(at(i, names.out), self.hidden, self.hidden, true, Role::Out),
                }),
                attention_norms: norms(0),
                mlp: Some(self.mlp(at(i, names.mlp[0]), at(i, names.mlp[1]))),
                mlp_norms: norms(1),
            }
        };
        (0..self.layers).map(layer).collect()
    }
}

/// The modules of a layer.
pub(super) struct Names {
    pub(super) qkv: [&'static str; 3],
    pub(super) out: &'static str,
    pub(super) mlp: [&'static str; 2],
    pub(super) norms: [&'static str; 2],
    /// Factors of what attention and the feed-forward block add.
    pub(super) scales: Option<[&'static str; 2]>,
    /// Whether norms are of the sums behind the blocks and not of their inputs.
    pub(super) norms_behind: bool,
}

pub(super) fn linear(module: String, rows: usize, cols: usize, bias: bool, role: Role) -> LinearSpec {
    LinearSpec { module, rows, cols, bias, transposed: false, role }
}

pub(super) fn tensor(name: impl Into<String>, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), shape: shape.to_vec() }
}

/// Whether the configuration is of that class of transformers; with several named the first counts.
pub(super) fn is_class(c: &Reader<'_>, end: &str) -> bool {
    let first = c.get("architectures").and_then(Value::as_array).and_then(|list| list.first());
    first.and_then(Value::as_str).is_some_and(|name| name.ends_with(end))
}

/// The number of classes, as transformers derives it.
pub(super) fn labels(c: &mut Reader<'_>) -> usize {
    match c.get("id2label").and_then(Value::as_object) {
        Some(names) if !names.is_empty() => names.len(),
        _ => c.size_or("num_labels", 2),
    }
}

/// Height and width; one number stands for both.
fn pair(c: &mut Reader<'_>, key: &str, default: usize) -> [usize; 2] {
    let side =
        |value: &Value| value.as_u64().filter(|side| (1..=MAX_SIDE).contains(side)).map(|side| side as usize);
    let found = match c.get(key) {
        None => Some([default; 2]),
        Some(Value::Array(sides)) => match sides.as_slice() {
            [height, width] => side(height).zip(side(width)).map(|(height, width)| [height, width]),
            _ => None,
        },
        Some(value) => side(value).map(|side| [side; 2]),
    };
    found.unwrap_or_else(|| {
        let found = c.get(key).map_or_else(String::new, brief);
        c.problem(format!(
            "{key}: expected a side, or height and width, from 1 to {MAX_SIDE}, found {found}"
        ));
        [1; 2]
    })
}
