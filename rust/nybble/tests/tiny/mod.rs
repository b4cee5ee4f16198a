//! A tiny random Llama in a temporary folder, plain or quantized, for the tests of models.

use std::collections::BTreeMap;
use std::path::Path;

use nybble::decode::Rng;
use nybble::format::Dtype;
use nybble::format::writer::SafeTensorsWriter;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const VOCAB: usize = 67;

/// A model folder in the making.
pub(crate) struct Tiny {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Tiny {
    /// Two layers, width 64, 4 heads on 2, tied.
    pub(crate) fn llama() -> Self {
        let config = json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 96,
            "tie_word_embeddings": true});
        let mut tiny = Self { config, tensors: BTreeMap::new() };
        let mut rng = Rng::new(11);
        let mut add = |name: String, shape: &[usize], mean: f64| {
            let spread = if name.contains("embed") { 1.0 } else { 0.2 };
            let draw = |_| (mean + spread * 3.4 * (rng.uniform() - 0.5)) as f32;
            let values: Vec<f32> = (0..shape.iter().product()).map(draw).collect();
            tiny.put(&name, shape, &values);
        };
        add("model.embed_tokens.weight".into(), &[VOCAB, 64], 0.0);
        add("model.norm.weight".into(), &[64], 1.0);
        for layer in 0..2 {
            let at = |part: &str| format!("model.layers.{layer}.{part}.weight");
            for (part, rows, cols) in [
                ("self_attn.q_proj", 64, 64),
                ("self_attn.k_proj", 32, 64),
                ("self_attn.v_proj", 32, 64),
                ("self_attn.o_proj", 64, 64),
                ("mlp.gate_proj", 96, 64),
                ("mlp.up_proj", 96, 64),
                ("mlp.down_proj", 64, 96),
            ] {
                add(at(part), &[rows, cols], 0.0);
            }
            add(at("input_layernorm"), &[64], 1.0);
            add(at("post_attention_layernorm"), &[64], 1.0);
        }
        tiny
    }

    pub(crate) fn put(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensors.insert(name.into(), (Dtype::F32, shape.to_vec(), bytes));
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        let (_, _, bytes) = &self.tensors[name];
        bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().expect("4 bytes"))).collect()
    }

    /// The linears and the embedding.
    pub(crate) fn matrices(&self) -> Vec<String> {
        let matrix = |name: &&String| self.tensors[*name].1.len() == 2;
        self.tensors.keys().filter(matrix).map(|name| name.trim_end_matches(".weight").to_owned()).collect()
    }

    /// Rounds a matrix to `bits` with a scale a `group` columns, leaves the rounded floats in `self`, and puts the packed
    /// tensors into `packed`.
    pub(crate) fn quantize(
        &mut self,
        module: &str,
        bits: u32,
        group: usize,
        symmetric: bool,
        packed: &mut Self,
    ) {
        let name = format!("{module}.weight");
        let (_, shape, _) = self.tensors[&name].clone();
        let (rows, cols) = (shape[0], shape[1]);
        let groups = cols / group;
        let levels = (1_u32 << bits) as f32 - 1.0;
        let middle = 1_u32 << (bits - 1);
        let mut values = self.floats(&name);
        let per_word = 32 / bits as usize;
        let mut words = vec![0_u32; rows * cols.div_ceil(per_word)];
        let mut zero_words = vec![0_u32; rows.div_ceil(per_word) * groups];
        let mut scales = Vec::new();
        for row in 0..rows {
            for g in 0..groups {
                let part = &mut values[row * cols + g * group..][..group];
                let (low, high) =
                    part.iter().fold((0.0_f32, 0.0_f32), |(low, high), v| (low.min(*v), high.max(*v)));
                let span = if symmetric { 2.0 * high.max(-low) } else { high - low };
                let scale = half::f16::from_f32(span / levels).to_f32();
                let zero = if symmetric { middle } else { (-low / scale).round() as u32 };
                scales.extend_from_slice(&half::f16::from_f32(scale).to_le_bytes());
                zero_words[row / per_word * groups + g] |= zero << (row % per_word * bits as usize);
                for (i, value) in part.iter_mut().enumerate() {
                    let code = ((*value / scale).round() + zero as f32).clamp(0.0, levels) as u32;
                    *value = scale * (code as f32 - zero as f32);
                    let column = g * group + i;
                    words[row * cols.div_ceil(per_word) + column / per_word] |=
                        code << (column % per_word * bits as usize);
                }
            }
        }
        self.put(&name, &shape, &values);
        packed.tensors.remove(&name);
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let mut add = |part: &str, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>| {
            packed.tensors.insert(format!("{module}.{part}"), (dtype, shape, bytes));
        };
        add("weight_packed", Dtype::I32, vec![rows, cols.div_ceil(per_word)], bytes(&words));
        add("weight_scale", Dtype::F16, vec![rows, groups], scales);
        let stated = [rows as i64, cols as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
        add("weight_shape", Dtype::I64, vec![2], stated);
        if !symmetric {
            add("weight_zero_point", Dtype::I32, vec![rows.div_ceil(per_word), groups], bytes(&zero_words));
        }
    }

    /// Writes the folder.
    pub(crate) fn save(&self) -> TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        self.save_to(dir.path());
        dir
    }

    pub(crate) fn save_to(&self, dir: &Path) {
        let entries =
            self.tensors.iter().map(|(name, (dtype, shape, _))| (name.clone(), *dtype, shape.clone()));
        let mut writer =
            SafeTensorsWriter::create(dir.join("model.safetensors"), entries.collect()).expect("a new file");
        for (name, (_, _, bytes)) in &self.tensors {
            writer.write(name, bytes).expect("room");
        }
        writer.finish().expect("complete");
        std::fs::write(dir.join("config.json"), self.config.to_string()).expect("room");
    }
}
