//! How a GGUF file reads as a Hugging Face folder.
//!
//! llama.cpp renames tensors (`blk.0.attn_q` for `model.layers.0.self_attn.q_proj`), keeps the configuration in typed
//! metadata (`llama.embedding_length` for `hidden_size`), and for some families stores weights in another order. A
//! [`GgufArch`] undoes the three for one family, so that the rest of the crate knows one set of names and layouts.

use std::borrow::Cow;

use serde_json::{Map, Value as Json, json};

use super::{ARCHS, Arch};
use crate::error::{Error, Result};
use crate::format::dtype::dequantize;
use crate::format::gguf::{Array, Gguf, Value};
use crate::model::spec::{MAX_LAYERS, Spec};

/// The GGUF side of a family.
#[derive(Debug)]
pub struct GgufArch {
    /// `general.architecture`.
    pub name: &'static str,
    /// The configuration from the metadata.
    pub config: fn(&Metadata<'_>) -> Result<Map<String, Json>>,
    /// Modules outside the layers: name in the file, name of the module.
    pub tensors: &'static [(&'static str, &'static str)],
    /// What the names of layers begin with, before the layer's number.
    pub block: &'static str,
    /// Modules of a layer: name in the file, name of the module.
    pub block_tensors: &'static [(&'static str, &'static str)],
    /// What was done to the tensor of that name and number of rows.
    pub transform: fn(&str, usize, &Spec) -> Transform,
}

/// What a converter did to a tensor, to be undone.
#[derive(Debug, Clone, PartialEq)]
pub enum Transform {
    /// Nothing.
    None,
    /// Row `r` stands at row `map[r]`.
    Rows(Vec<u32>),
    /// Rows and columns are exchanged.
    Transposed,
    /// One was added.
    MinusOne,
}

/// [`Transform::None`] for all tensors.
pub(super) fn unchanged(_: &str, _: usize, _: &Spec) -> Transform {
    Transform::None
}

/// The layers of Llama and Qwen.
pub(super) const GATED_BLOCK: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The family of a file.
pub fn find(gguf: &Gguf) -> Result<(&'static Arch, &'static GgufArch)> {
    let key = "general.architecture";
    let name = gguf.text(key)?.ok_or_else(|| Error::format(gguf.path(), key, "a text", "nothing"))?;
    let known = || ARCHS.iter().filter_map(|arch| arch.gguf.map(|gguf| (*arch, gguf)));
    known().find(|(_, arch)| arch.name == name).ok_or_else(|| {
        let names: Vec<_> = known().map(|(_, arch)| arch.name).collect();
        let shown: String = name.chars().filter(|c| !c.is_control()).take(60).collect();
        let file = gguf.path().display();
        Error::unsupported(
            format!("{file}: architecture {shown:?}"),
            format!("{} are read", names.join(", ")),
        )
    })
}

impl GgufArch {
    /// The Hugging Face name of a tensor; none for tensors that no module reads.
    pub fn hf_name(&self, name: &str) -> Option<String> {
        let (module, end) = name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"))?;
        if let Some(rest) = module.strip_prefix("blk.") {
            let (layer, part) = rest.split_once('.')?;
            let number: usize = layer.parse().ok().filter(|n| *n < MAX_LAYERS)?;
            let (_, hf) = self.block_tensors.iter().find(|(gguf, _)| *gguf == part)?;
            return Some(format!("{}.{number}.{hf}.{end}", self.block));
        }
        let (_, hf) = self.tensors.iter().find(|(gguf, _)| *gguf == module)?;
        Some(format!("{hf}.{end}"))
    }
}

/// The metadata of one file.
#[derive(Debug, Clone, Copy)]
pub struct Metadata<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl<'a> Metadata<'a> {
    /// The metadata of `gguf`, whose architecture is `arch`.
    pub fn new(gguf: &'a Gguf, arch: &'a str) -> Self {
        Self { gguf, arch }
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    /// A whole number of the architecture, if the file says it.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        self.gguf.u64(&self.key(key))
    }

    /// A whole number of the architecture that the file must say.
    pub fn need(&self, key: &str) -> Result<u64> {
        let key = self.key(key);
        self.gguf.u64(&key)?.ok_or_else(|| Error::format(self.gguf.path(), key, "a whole number", "nothing"))
    }

    /// A number of the architecture, if the file says it.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        // Most are f32: the shortest decimal that means the same f32 is what the converter was given.
        let shortest = |number: f64| (number as f32).to_string().parse().unwrap_or(number);
        Ok(self.gguf.f64(&self.key(key))?.map(shortest))
    }

    /// Whether the file has that tensor.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.gguf.tensors().contains_key(name)
    }

    /// What every configuration has: the family, the vocabulary, the special tokens, whether the head is the embedding.
    pub fn base(&self, model_type: &str) -> Result<Map<String, Json>> {
        if self.size("expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(Error::unsupported(
                format!("{}: a mixture of experts", self.gguf.path().display()),
                "dense models are read",
            ));
        }
        let embedding = self.gguf.tensor("token_embd.weight")?;
        let mut config = Map::new();
        let class = match model_type {
            "llama" => "LlamaForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            "gemma3_text" => "Gemma3ForCausalLM",
            "bloom" => "BloomForCausalLM",
            _ => "GPT2LMHeadModel",
        };
        config.insert("architectures".into(), json!([class]));
        config.insert("model_type".into(), json!(model_type));
        config.insert("vocab_size".into(), json!(embedding.shape.first()));
        for (key, name) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = self.gguf.u64(&format!("tokenizer.ggml.{name}_token_id"))? {
                config.insert(key.into(), json!(id));
            }
        }
        config.insert("tie_word_embeddings".into(), json!(!self.has_tensor("output.weight")));
        Ok(config)
    }

    /// A whole number for each of `layers` layers, which the file says once or layer by layer.
    fn each(&self, key: &str, layers: usize) -> Result<Option<Vec<u64>>> {
        let full = self.key(key);
        let found = match self.gguf.metadata().get(&full) {
            None => return Ok(None),
            Some(Value::Array(Array::U32(list))) => list.iter().map(|n| Some((*n).into())).collect(),
            Some(Value::Array(Array::I32(list))) => list.iter().map(|n| (*n).try_into().ok()).collect(),
            Some(Value::Array(Array::U64(list))) => list.iter().copied().map(Some).collect(),
            Some(_) => self.gguf.u64(&full)?.map(|once| vec![once; layers]),
        };
        let found: Option<Vec<u64>> = found;
        match found {
            Some(list) if list.len() == layers => Ok(Some(list)),
            _ => {
                let expected = format!("a whole number or {layers} of them");
                Err(Error::format(self.gguf.path(), full, expected, "others"))
            }
        }
    }

    /// The configuration that Llama, Qwen and Gemma share. Where layers differ it has their `nybble.structure`.
    pub fn gated(&self, model_type: &str) -> Result<Map<String, Json>> {
        let mut config = self.base(model_type)?;
        let (hidden, count) = (self.need("embedding_length")?, self.need("block_count")?);
        let layers = usize::try_from(count).ok().filter(|n| *n <= MAX_LAYERS).ok_or_else(|| {
            let expected = format!("at most {MAX_LAYERS}");
            Error::format(self.gguf.path(), self.key("block_count"), expected, count.to_string())
        })?;
        let absent = |key: &str| Error::format(self.gguf.path(), self.key(key), "a whole number", "nothing");
        let each = |key: &str| self.each(key, layers)?.ok_or_else(|| absent(key));
        let (heads, inner) = (each("attention.head_count")?, each("feed_forward_length")?);
        let kv_heads = self.each("attention.head_count_kv", layers)?.unwrap_or_else(|| heads.clone());
        let most = |list: &[u64]| list.iter().copied().max().unwrap_or(0);
        let differ = [&heads, &kv_heads, &inner].iter().any(|list| list.windows(2).any(|w| w[0] != w[1]));
        let kv = most(&kv_heads);
        let mut all_heads = most(&heads);
        if differ {
            config.insert("nybble".into(), self.structure(&heads, &kv_heads, &inner));
            // No layer's own, so only what a reader asks of it matters: heads divided evenly.
            all_heads = all_heads.div_ceil(kv.max(1)).saturating_mul(kv.max(1));
        }
        for (key, value) in [
            ("hidden_size", hidden),
            ("intermediate_size", most(&inner)),
            ("num_hidden_layers", count),
            ("num_attention_heads", all_heads),
            ("num_key_value_heads", kv),
            ("max_position_embeddings", self.need("context_length")?),
        ] {
            config.insert(key.into(), json!(value));
        }
        let heads = all_heads;
        let rotated = self.size("rope.dimension_count")?;
        let width = self.size("attention.key_length")?.or(rotated).unwrap_or(hidden / heads.max(1));
        for (key, other) in [
            ("rope.dimension_count", rotated),
            ("attention.value_length", self.size("attention.value_length")?),
        ] {
            if other.is_some_and(|other| other != width) {
                let found = other.map_or_else(String::new, |n| n.to_string());
                return Err(Error::unsupported(
                    format!("{}: {} {found}", self.gguf.path().display(), self.key(key)),
                    format!("the head's width {width} is"),
                ));
            }
        }
        config.insert("head_dim".into(), json!(width));
        config.insert("hidden_act".into(), json!("silu"));
        let eps = self.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6);
        config.insert("rms_norm_eps".into(), json!(eps));
        Ok(config)
    }

    /// The section for layers of different shapes, with the biases that compensation has added.
    fn structure(&self, heads: &[u64], kv_heads: &[u64], inner: &[u64]) -> Json {
        let entry = |layer: usize| {
            let has = |part: &str| self.has_tensor(&format!("blk.{layer}.{part}.bias"));
            let biases: Vec<_> = [("attn_output", "attn_q", "o_proj"), ("ffn_down", "ffn_up", "down_proj")]
                .into_iter()
                .filter_map(|(last, first, name)| (has(last) && !has(first)).then_some(name))
                .collect();
            json!({"num_attention_heads": heads[layer], "num_key_value_heads": kv_heads[layer],
                   "intermediate_size": inner[layer], "biases": biases})
        };
        json!({"version": 1, "structure": {"layers": (0..heads.len()).map(entry).collect::<Vec<_>>()}})
    }

    #[expect(clippy::float_cmp, reason = "a factor of exactly 1 is none")]
    /// Adds `rope_theta` and `rope_scaling`. `config` has `head_dim` and `max_position_embeddings`.
    pub fn rope(&self, config: &mut Map<String, Json>) -> Result<()> {
        if let Some(theta) = self.number("rope.freq_base")? {
            config.insert("rope_theta".into(), json!(theta));
        }
        let size = |key: &str| config.get(key).and_then(Json::as_u64).unwrap_or(1);
        let context = size("max_position_embeddings");
        let original = self.size("rope.scaling.original_context_length")?.unwrap_or(context);
        let factor = self.number("rope.scaling.factor")?;
        let kind = self.gguf.text(&self.key("rope.scaling.type"))?.unwrap_or("none");
        let mut scaling = match (kind, factor) {
            ("linear", Some(factor)) if factor != 1.0 => json!({"rope_type": "linear", "factor": factor}),
            ("yarn", Some(factor)) => {
                let mut yarn = json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original});
                for (key, name) in [
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ] {
                    if let Some(value) = self.number(name)? {
                        yarn[key] = json!(value);
                    }
                }
                yarn
            }
            ("none" | "linear", _) => Json::Null,
            (other, _) => {
                let shown: String = other.chars().take(60).collect();
                return Err(Error::unsupported(
                    format!("{}: rope scaling {shown:?}", self.gguf.path().display()),
                    "none, linear and yarn are read",
                ));
            }
        };
        if let Some(factors) = self.rope_factors(size("head_dim"))? {
            scaling = factors_as_config(&factors, context);
        }
        if !scaling.is_null() {
            config.insert("rope_scaling".into(), scaling);
        }
        Ok(())
    }

    #[expect(clippy::float_cmp, reason = "divisors that are all exactly 1 do nothing")]
    /// The divisors of the frequencies, which a converter writes as a tensor for Llama 3.
    fn rope_factors(&self, head_dim: u64) -> Result<Option<Vec<f32>>> {
        let name = "rope_freqs.weight";
        let Some(info) = self.gguf.tensors().get(name) else { return Ok(None) };
        let expected = usize::try_from(head_dim / 2).unwrap_or(usize::MAX);
        if info.shape != [expected] || !info.dtype.is_float() {
            let found = format!("{} {:?}", info.dtype, info.shape);
            return Err(Error::format(self.gguf.path(), name, format!("[{expected}] floats"), found));
        }
        let mut factors = vec![0.0; expected]; // as many as the file holds
        dequantize(info.dtype, self.gguf.bytes(name)?, &mut factors)?;
        if let Some(bad) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
            return Err(Error::format(self.gguf.path(), name, "positive numbers", bad.to_string()));
        }
        Ok(Some(factors).filter(|factors| factors.iter().any(|factor| *factor != 1.0)))
    }
}

/// Divisors of rotary frequencies as a `rope_scaling`. The formula that made them is not in the file, so they are written
/// out; `longrope` is the spelling that transformers reads too.
fn factors_as_config(factors: &[f32], context: u64) -> Json {
    json!({"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0,
           "original_max_position_embeddings": context})
}

/// A tensor's name cut to what a message can take.
pub(crate) fn shown(name: &str) -> Cow<'_, str> {
    if name.len() <= 96 { name.into() } else { name.chars().take(96).chain("...".chars()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_family() {
        let name = |arch: &str, name: &str| {
            let (_, gguf) = ARCHS
                .iter()
                .filter_map(|a| a.gguf.map(|gguf| (a, gguf)))
                .find(|(_, gguf)| gguf.name == arch)
                .expect("known");
            gguf.hf_name(name)
        };
        for (arch, stored, hf) in [
            ("llama", "blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
            ("llama", "output.weight", "lm_head.weight"),
            ("qwen2", "blk.0.attn_v.bias", "model.layers.0.self_attn.v_proj.bias"),
            ("qwen3", "blk.0.attn_k_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
            ("gemma3", "blk.1.post_ffw_norm.weight", "model.layers.1.post_feedforward_layernorm.weight"),
            ("gemma3", "blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight"),
            ("gpt2", "position_embd.weight", "transformer.wpe.weight"),
            ("gpt2", "blk.3.ffn_down.bias", "transformer.h.3.mlp.c_proj.bias"),
            ("bloom", "token_embd_norm.bias", "transformer.word_embeddings_layernorm.bias"),
        ] {
            assert_eq!(name(arch, stored).as_deref(), Some(hf));
        }
        for stored in
            ["rope_freqs.weight", "blk.x.attn_q.weight", "blk.99999999.attn_q.weight", "blk.1.attn_q", "a"]
        {
            assert_eq!(name("llama", stored), None);
        }
    }
}
