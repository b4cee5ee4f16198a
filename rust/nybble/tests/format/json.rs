//! JSON files: values, and the four caps.

use nybble::format::json::{self, CONFIG_BYTES};
use serde_json::json;

fn refused(text: &str) -> String {
    json::parse("f", text.as_bytes()).expect_err(text).to_string()
}

#[test]
fn values_are_what_the_text_says() {
    let text = r#" {"a": [1, -2, 2.5, 18446744073709551615, true, null, "é\n"], "b": {"c": {}}} "#;
    let value = json::parse("f", text.as_bytes()).expect("good JSON");
    assert_eq!(value, json!({"a": [1, -2, 2.5, u64::MAX, true, null, "é\n"], "b": {"c": {}}}));
    // Keys keep their order.
    assert_eq!(value.as_object().expect("an object").keys().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn a_key_said_twice_is_refused() {
    assert_eq!(
        refused(r#"{"a":1,"b":{"k":1,"k":1}}"#),
        r#"f: "k": expected each key once, found a second one at line 1 column 21"#
    );
    assert!(json::parse("f", br#"{"a":{"k":1},"b":{"k":1}}"#).is_ok());
}

#[test]
fn depth_is_limited() {
    let nested = |depth: usize| format!(r#"{{"k":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    assert!(json::parse("f", nested(63).as_bytes()).is_ok());
    let message = refused(&nested(64));
    assert!(message.starts_with(r#"f: "k": expected at most 64 levels of nesting, found more"#), "{message}");
    // Far beyond the stack, closed or not, arrays or objects.
    assert!(refused(&nested(1_000_000)).contains("levels of nesting"));
    assert!(refused(&"[".repeat(1_000_000)).contains("levels of nesting"));
    assert!(refused(&r#"{"a":"#.repeat(1_000_000)).contains("levels of nesting"));
}

#[test]
fn memory_is_limited() {
    let message = refused(&format!("[{}0]", "0,".repeat(4_000_000)));
    assert!(message.starts_with("f: text: expected fewer values, found so many"), "{message}");
    assert!(refused(&format!("[{}0]", r#"{"":0},"#.repeat(1_000_000))).contains("expected fewer values"));
    // A long text or a table of ordinary entries stays within it.
    assert!(json::parse("f", format!("\"{}\"", "x".repeat(20_000_000)).as_bytes()).is_ok());
    let table: Vec<_> = (0..100_000).map(|i| format!(r#""token {i:07}": {i}"#)).collect();
    assert!(json::parse("f", format!("{{{}}}", table.join(",")).as_bytes()).is_ok());
}

#[test]
fn broken_texts_are_refused() {
    for (text, expected) in [
        ("", "f: text: expected valid JSON, found EOF while parsing a value at line 1 column 0"),
        ("{}{}", "f: text: expected valid JSON, found trailing characters at line 1 column 3"),
        ("[1,]", "f: text: expected valid JSON, found trailing comma at line 1 column 4"),
        ("[NaN]", "f: text: expected valid JSON, found expected value at line 1 column 2"),
        ("[1e999]", "f: text: expected valid JSON, found number out of range at line 1 column 6"),
        (
            "\"\\ud800\"",
            "f: text: expected valid JSON, found unexpected end of hex escape at line 1 column 8",
        ),
    ] {
        assert_eq!(refused(text), expected);
    }
    assert!(json::parse("f", b"\"\xff\"").is_err());
}

#[test]
fn size_is_limited_before_reading() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    std::fs::write(&path, "{\"a\": 1}").expect("a file");
    assert_eq!(json::read(&path, CONFIG_BYTES).expect("good JSON"), json!({"a": 1}));
    assert_eq!(
        json::read(&path, 7).expect_err("too large").to_string(),
        format!("{}: size: expected at most 7 bytes, found 8 bytes", path.display())
    );
    // Terabytes that take no room on the disk.
    std::fs::File::create(&path).and_then(|file| file.set_len(1 << 40)).expect("a sparse file");
    assert!(json::read(&path, CONFIG_BYTES).is_err());
}
