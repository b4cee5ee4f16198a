//! Layers of different shapes: what structured pruning leaves of a model.
//!
//! A family's configuration has one number of heads and one inner width for all layers. Where pruning cut each layer by
//! itself, the `nybble` section of `config.json` lists what is left, an entry a layer:
//!
//! ```text
//! "structure": {"layers": [{"num_attention_heads": 5, "num_key_value_heads": 2, "queries_per_kv": [3, 2],
//!                           "intermediate_size": 1152, "biases": ["down_proj"]}, ...]}
//! ```
//!
//! What an entry leaves out is as the family's keys say. `queries_per_kv` stands where key heads have different numbers of
//! query heads. Without heads a layer has no attention, with an inner width of 0 no feed-forward block, and in either case no
//! norm around it. `biases` names linears that got a bias, by which compensation stands in for the mean of what was cut.

use serde_json::{Map, Value};

use super::config::{Reader, brief};
use super::spec::{AttentionSpec, BlockNorms, LayerSpec, LinearSpec, Qkv};
use crate::error::{Error, Result};

/// Where it stands, for messages.
const KEY: &str = "nybble.structure";

/// Keys of an entry.
const KEYS: [&str; 5] =
    ["num_attention_heads", "num_key_value_heads", "queries_per_kv", "intermediate_size", "biases"];

/// Cuts the layers as the configuration says, if it does. With `alibi`, heads have slopes of their own.
pub fn apply(config: &Value, specs: &mut [LayerSpec], alibi: bool) -> Result<()> {
    let section = config.get("nybble").and_then(|section| section.get("structure"));
    let Some(structure) = section.filter(|section| !section.is_null()) else { return Ok(()) };
    let mut reader = Reader::new(config)?;
    let layers = match structure.get("layers") {
        Some(Value::Array(layers)) if layers.len() == specs.len() => layers,
        other => {
            let found = other.map_or_else(|| "nothing".into(), brief);
            reader.problem(format!("{KEY}.layers: expected a list of {}, found {found}", specs.len()));
            return reader.finish(());
        }
    };
    for (i, (entry, layer)) in layers.iter().zip(specs).enumerate() {
        let key = format!("{KEY}.layers[{i}]");
        let Value::Object(entry) = entry else {
            reader.problem(format!("{key}: expected an object, found {}", brief(entry)));
            continue;
        };
        if let Some(key) = entry.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let shown: String = key.chars().filter(|c| !c.is_control()).take(60).collect();
            let detail = "a key that is not read; a newer nybble may have made the folder";
            return Err(Error::unsupported(format!("{KEY}.layers[{i}].{shown}"), detail));
        }
        let mut own = Reader::inner(entry);
        cut(&mut own, entry, alibi, layer);
        reader.absorb(&key, own);
    }
    reader.finish(())
}

/// Cuts one layer as its entry says.
fn cut(entry: &mut Reader<'_>, keys: &Map<String, Value>, alibi: bool, layer: &mut LayerSpec) {
    if let Some(attention) = &mut layer.attention {
        let heads = entry.count("num_attention_heads").unwrap_or(attention.heads);
        if heads == 0 {
            layer.attention = None;
            layer.attention_norms = BlockNorms::default();
        } else {
            cut_attention(entry, heads, alibi, attention);
        }
    }
    if let Some(mlp) = &mut layer.mlp {
        match entry.count("intermediate_size") {
            None => {}
            Some(0) => {
                layer.mlp = None;
                layer.mlp_norms = BlockNorms::default();
            }
            Some(inner) => {
                mlp.gate.iter_mut().chain([&mut mlp.up]).for_each(|linear| linear.rows = inner);
                mlp.down.cols = inner;
            }
        }
    }
    let Some(biases) = keys.get("biases").filter(|biases| !biases.is_null()) else { return };
    let names = biases.as_array().map(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    let Some(Some(names)) = names else {
        entry.problem(format!("biases: expected a list of names, found {}", brief(biases)));
        return;
    };
    for name in names {
        let linears = layer
            .attention
            .iter_mut()
            .map(|attention| &mut attention.out)
            .chain(layer.mlp.iter_mut().map(|mlp| &mut mlp.down));
        let named = |linear: &&mut LinearSpec| linear.module.rsplit('.').next() == Some(name);
        if let Some(linear) = linears.into_iter().find(named) {
            linear.bias = true;
            continue;
        }
        let name: String = name.chars().filter(|c| !c.is_control()).take(60).collect();
        entry.problem(format!("biases: expected the last linears of the layer's blocks, found {name:?}"));
    }
}

fn cut_attention(entry: &mut Reader<'_>, heads: usize, alibi: bool, attention: &mut AttentionSpec) {
    let kv_heads = entry.count("num_key_value_heads").unwrap_or(attention.kv_heads).max(1);
    let groups = entry.get("queries_per_kv");
    let listed: Option<Vec<usize>> = groups.and_then(Value::as_array).map(|list| {
        let counts = list.iter().map(|count| count.as_u64().and_then(|count| usize::try_from(count).ok()));
        let mut first = 0usize;
        let ends = counts.map(|count| {
            first = first.saturating_add(count.unwrap_or(0));
            first
        });
        std::iter::once(0).chain(ends).collect()
    });
    match (groups, listed) {
        (None, _) => entry.divides(("num_attention_heads", heads), ("num_key_value_heads", kv_heads)),
        (Some(_), Some(groups))
            if groups.len() == kv_heads + 1
                && groups.last() == Some(&heads)
                && groups.is_sorted_by(|a, b| a < b) =>
        {
            attention.groups = Some(groups);
        }
        (Some(found), _) => entry.problem(format!(
            "queries_per_kv: expected {kv_heads} positive numbers whose sum is {heads}, found {}",
            brief(found)
        )),
    }
    if alibi && heads != attention.heads {
        entry.problem(format!(
            "num_attention_heads: expected all {} of a model whose heads have slopes of their own, found {heads}",
            attention.heads
        ));
    }
    (attention.heads, attention.kv_heads) = (heads, kv_heads);
    let (q_width, kv_width) = (attention.q_width(), attention.kv_width());
    match &mut attention.qkv {
        Qkv::Separate { q, k, v } => (q.rows, k.rows, v.rows) = (q_width, kv_width, kv_width),
        Qkv::Fused { linear, .. } if kv_heads == heads => linear.rows = q_width.saturating_mul(3),
        Qkv::Fused { .. } => entry.problem(format!(
            "num_key_value_heads: expected as many as query heads, {heads}, found {kv_heads}"
        )),
    }
    attention.out.cols = q_width;
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::arch;
    use crate::model::spec::Spec;

    fn llama(structure: &Value) -> Result<Spec> {
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32,
            "nybble": {"version": 1, "structure": structure},
        });
        let mut spec = arch::find(&config)?.decoder(&config)?;
        apply(&config, &mut spec.layers, false)?;
        Ok(spec)
    }

    #[test]
    fn layers_are_cut_each_by_itself() {
        let spec = llama(&json!({"layers": [
            {"num_attention_heads": 3, "queries_per_kv": [2, 1], "intermediate_size": 32, "biases": ["down_proj"]},
            {"num_attention_heads": 0, "num_key_value_heads": 0},
        ]}))
        .expect("good");
        let [first, second] = &spec.layers[..] else { panic!("two layers") };
        let attention = first.attention.as_ref().expect("attention");
        assert_eq!((attention.heads, attention.kv_heads), (3, 2));
        assert_eq!(attention.groups.as_deref(), Some(&[0, 2, 3][..]));
        assert_eq!(attention.qkv.linears().iter().map(|l| l.rows).collect::<Vec<_>>(), [48, 32, 32]);
        assert_eq!((attention.out.cols, attention.out.bias), (48, false));
        let mlp = first.mlp.as_ref().expect("a feed-forward block");
        assert_eq!((mlp.up.rows, mlp.down.cols, mlp.down.bias), (32, 32, true));
        assert!(second.attention.is_none() && second.attention_norms == BlockNorms::default());
        assert_eq!(second.mlp.as_ref().expect("whole").up.rows, 96);
        assert_eq!(
            llama(&Value::Null).expect("whole").layers[1],
            llama(&json!({"layers": [{}, {}]})).expect("whole").layers[1]
        );
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        for (structure, words) in [
            (json!({"layers": [{}]}), "expected a list of 2"),
            (json!([]), "found nothing"),
            (json!({"layers": [{}, 3]}), "layers[1]: expected an object"),
            (json!({"layers": [{}, {"hidden_size": 3}]}), "layers[1].hidden_size"),
            (json!({"layers": [{}, {"intermediate_size": -1}]}), "layers[1].intermediate_size"),
            (json!({"layers": [{"num_attention_heads": 3}, {}]}), "a multiple of num_key_value_heads = 2"),
            (json!({"layers": [{"queries_per_kv": [4, 0]}, {}]}), "queries_per_kv"),
            (json!({"layers": [{"queries_per_kv": [2, 3]}, {}]}), "whose sum is 4"),
            (json!({"layers": [{"queries_per_kv": "2"}, {}]}), "queries_per_kv"),
            (json!({"layers": [{"biases": ["q_proj"]}, {}]}), "q_proj"),
            (json!({"layers": [{"biases": [1]}, {}]}), "a list of names"),
        ] {
            let message = llama(&structure).expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
