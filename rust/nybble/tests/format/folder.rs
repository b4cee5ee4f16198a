//! Model folders, single and sharded, and what they may not reach.

use std::fs;
use std::path::Path;

use nybble::format::folder::{Folder, contained};
use nybble::format::{Access, Dtype};

use crate::badfiles::{safetensors, small_safetensors, write_sharded};

const FIRST: &str = "model-00001-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn sharded() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write_sharded(folder.path());
    folder
}

/// The message of opening a folder, with the folder's path replaced by `D`.
fn refused(folder: &Path) -> String {
    let error = Folder::open(folder, Access::Map).expect_err("a bad folder").to_string();
    error.replace(&folder.display().to_string(), "D")
}

fn write_index(folder: &Path, weight_map: &str) {
    let text = format!(r#"{{"metadata":{{}},"weight_map":{weight_map}}}"#);
    fs::write(folder.join(INDEX), text).expect("a file");
}

#[test]
fn a_single_file_and_shards_are_read() {
    let folder = sharded();
    for access in [Access::Map, Access::Read] {
        let model = Folder::open(folder.path(), access).expect("a good folder");
        assert_eq!(model.config()["hidden_size"], 8);
        assert_eq!(model.shards(), 2);
        assert_eq!(model.tensors().keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(model.bytes("b").expect("there"), [24, 25, 26, 27]);
        assert_eq!(model.bytes("c").expect("there"), [7, 8]);
        assert_eq!(model.tensor("c").expect("there").dtype, Dtype::U8);
        assert_eq!(model.file_of("a").expect("there"), folder.path().join(FIRST));
        let message = model.bytes("d").expect_err("not there").to_string();
        assert!(message.ends_with(": \"d\": expected a tensor of this name, found none"), "{message}");
        model.release("c");
        model.release("d");
        assert_eq!(model.bytes("c").expect("there"), [7, 8]);
    }
    // The single file wins.
    fs::write(folder.path().join("model.safetensors"), small_safetensors()).expect("a file");
    let model = Folder::open(folder.path(), Access::Map).expect("a good folder");
    assert_eq!((model.shards(), model.tensors().len()), (1, 2));
}

#[test]
fn a_folder_without_configuration_or_weights_is_unfinished() {
    let folder = sharded();
    fs::remove_file(folder.path().join("config.json")).expect("it was there");
    assert_eq!(
        refused(folder.path()),
        "D: config.json: expected a file of this name, found none: not a model folder, or one whose writing was interrupted"
    );
    fs::write(folder.path().join("config.json"), "[1]").expect("a file");
    assert_eq!(
        refused(folder.path()),
        "D/config.json: text: expected a JSON object, found another JSON value"
    );
    fs::write(folder.path().join("config.json"), "{\"a\":1").expect("a file");
    assert!(refused(folder.path()).starts_with("D/config.json: text: expected valid JSON, found EOF"));

    let empty = tempfile::tempdir().expect("a folder");
    fs::write(empty.path().join("config.json"), "{}").expect("a file");
    assert_eq!(
        refused(empty.path()),
        "D: weights: expected model.safetensors or model.safetensors.index.json, found neither"
    );
    fs::write(empty.path().join("x.gguf"), "").expect("a file");
    assert!(refused(empty.path()).ends_with("found neither, but \"x.gguf\": open that file itself"));
    // Pickles beside or instead of safetensors.
    for name in ["pytorch_model.bin", "model.ckpt", "consolidated.00.pth"] {
        let path = empty.path().join(name);
        fs::write(&path, "").expect("a file");
        assert!(
            refused(empty.path()).starts_with(&format!("D/{name}: a pickle checkpoint is not supported"))
        );
        fs::remove_file(path).expect("it was there");
    }
    let file = empty.path().join("config.json");
    assert_eq!(refused(&file), "D: kind of file: expected a model folder, found a file");
}

#[test]
fn an_index_names_plain_files_of_the_folder_only() {
    let folder = sharded();
    let outside = folder.path().with_extension("outside.safetensors");
    fs::write(&outside, small_safetensors()).expect("a file");
    let outside_name = outside.file_name().expect("a name").to_string_lossy().into_owned();
    let absolute = outside.display().to_string();
    let names = [
        "../x.safetensors",
        &format!("../{outside_name}"),
        &absolute,
        "..",
        ".",
        "",
        "/",
        "sub/x.safetensors",
    ];
    let more = [
        "./x.safetensors",
        "x.safetensors/",
        "..\\\\x.safetensors",
        "C:x.safetensors",
        "x\\u0000.safetensors",
    ];
    for name in names.into_iter().chain(more) {
        write_index(folder.path(), &format!(r#"{{"a":"{name}"}}"#));
        let message = refused(folder.path());
        let expected =
            "D/model.safetensors.index.json: weight_map: expected names of files in the folder, found \"";
        assert!(message.starts_with(expected), "{name}: {message}");
    }
    write_index(folder.path(), r#"{"a":"pytorch_model-00001-of-00002.bin"}"#);
    assert!(refused(folder.path()).starts_with("D/pytorch_model-00001-of-00002.bin: a pickle checkpoint"));
    write_index(folder.path(), r#"{"a":"none.safetensors"}"#);
    assert_eq!(
        refused(folder.path()),
        "D/none.safetensors: shard: expected the file, as the index names it, found no such file"
    );
    fs::create_dir(folder.path().join("folder.safetensors")).expect("a folder");
    write_index(folder.path(), r#"{"a":"folder.safetensors"}"#);
    assert_eq!(
        refused(folder.path()),
        "D/folder.safetensors: kind of file: expected a regular file, found a folder"
    );
    fs::remove_file(outside).expect("it was there");
}

#[cfg(unix)]
#[test]
fn links_may_not_lead_out_of_the_folder() {
    use std::os::unix::fs::symlink;
    let root = tempfile::tempdir().expect("a folder");
    let secret = root.path().join("secret.safetensors");
    fs::write(&secret, small_safetensors()).expect("a file");
    let folder = root.path().join("model");
    fs::create_dir(&folder).expect("a folder");
    write_sharded(&folder);

    // A link inside the folder is fine; so is a link to the folder itself.
    fs::rename(folder.join(FIRST), folder.join("real")).expect("renamed");
    symlink("real", folder.join(FIRST)).expect("a link");
    symlink(&folder, root.path().join("alias")).expect("a link");
    assert!(Folder::open(&folder, Access::Map).is_ok());
    assert!(Folder::open(root.path().join("alias"), Access::Map).is_ok());

    // One that leads out is refused, for shards, the single file, the index and the configuration.
    for name in [FIRST, "model.safetensors", INDEX, "config.json"] {
        let link = folder.join(name);
        let kept = fs::read(&link).ok();
        let _ = fs::remove_file(&link);
        symlink("../secret.safetensors", &link).expect("a link");
        let target = secret.canonicalize().expect("a path").display().to_string();
        let message = Folder::open(&folder, Access::Map).expect_err("a link out").to_string();
        assert_eq!(
            message,
            format!(
                "{}: symbolic link: expected a file inside the folder (or its hub cache), found {target}",
                link.display()
            )
        );
        fs::remove_file(&link).expect("it was there");
        if let Some(bytes) = kept {
            fs::write(&link, bytes).expect("a file");
        }
    }
    assert!(Folder::open(&folder, Access::Map).is_ok());
    // A link to nowhere, and one to itself.
    fs::remove_file(folder.join(FIRST)).expect("it was there");
    symlink("nowhere", folder.join(FIRST)).expect("a link");
    assert!(Folder::open(&folder, Access::Map).is_err());
    symlink("loop", folder.join("loop")).expect("a link");
    assert!(contained(&folder, "loop").is_err());
}

#[cfg(unix)]
#[test]
fn the_hub_cache_is_read_through_its_links() {
    use std::os::unix::fs::symlink;
    let root = tempfile::tempdir().expect("a folder");
    let repository = root.path().join("models--org--name");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/0123abcd"));
    fs::create_dir_all(&blobs).expect("a folder");
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::write(blobs.join("1111"), small_safetensors()).expect("a file");
    fs::write(blobs.join("2222"), "{}").expect("a file");
    symlink("../../blobs/1111", snapshot.join("model.safetensors")).expect("a link");
    symlink("../../blobs/2222", snapshot.join("config.json")).expect("a link");
    assert_eq!(Folder::open(&snapshot, Access::Map).expect("a good folder").tensors().len(), 2);

    // Not when the blobs are themselves a link to elsewhere.
    fs::rename(&blobs, root.path().join("elsewhere")).expect("renamed");
    symlink(root.path().join("elsewhere"), &blobs).expect("a link");
    assert!(refused(&snapshot).contains("symbolic link: expected a file inside the folder"));
}

#[test]
fn index_and_shards_must_agree() {
    let folder = sharded();
    let second = "model-00002-of-00002.safetensors";
    write_index(folder.path(), &format!(r#"{{"a":"{FIRST}","b":"{FIRST}","c":"{second}","d":"{second}"}}"#));
    assert_eq!(
        refused(folder.path()),
        format!("D/{second}: \"d\": expected this tensor, as the index says, found none")
    );
    write_index(folder.path(), &format!(r#"{{"a":"{FIRST}","b":"{second}"}}"#));
    assert_eq!(
        refused(folder.path()),
        format!("D/{second}: \"b\": expected this tensor, as the index says, found it in D/{FIRST}")
    );
    // Tensors that the index does not name are not part of the model.
    write_index(folder.path(), &format!(r#"{{"b":"{FIRST}","c":"{second}"}}"#));
    let model = Folder::open(folder.path(), Access::Map).expect("a good folder");
    assert_eq!(model.tensors().keys().collect::<Vec<_>>(), ["b", "c"]);
    // One tensor in two shards.
    let again = safetensors(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, &[1]);
    fs::write(folder.path().join(second), again).expect("a file");
    write_index(folder.path(), &format!(r#"{{"b":"{FIRST}","a":"{second}"}}"#));
    assert_eq!(
        refused(folder.path()),
        format!("D/{second}: \"a\": expected a tensor in one shard only, found another one in D/{FIRST}")
    );
}

#[test]
fn broken_indexes_are_refused() {
    let folder = sharded();
    let index = "D/model.safetensors.index.json: ";
    for (text, expected) in [
        ("{}", "weight_map: expected one, found none at line 1 column 2".to_string()),
        (r#"{"weight_map":{}}"#, "weight_map: expected at least one tensor, found none".into()),
        (r#"{"weight_map":[]}"#, "weight_map: expected an object of tensor and file names, found invalid type: sequence, expected an object of tensor and file names".into()),
        (r#"{"weight_map":{"a":1}}"#, "\"a\": expected a file name, found invalid type: integer `1`, expected a string".into()),
        (r#"{"weight_map":{"a":"x","a":"x"}}"#, "\"a\": expected one file for this tensor, found a second entry".into()),
        (r#"{"weight_map":{},"weight_map":{}}"#, "weight_map: expected one, found a second one".into()),
        (r#"{"weight_map":{"":"x"}}"#, "tensor name \"\": expected a name, found an empty one".into()),
        ("", "contents: expected JSON text, found an empty file".into()),
        (" ", "index: expected valid JSON, found EOF while parsing a value".into()),
    ] {
        fs::write(folder.path().join(INDEX), text).expect("a file");
        let message = refused(folder.path());
        assert!(message.starts_with(&format!("{index}{expected}")), "{text}: {message}");
    }
    // What is not the map is skipped without recursion, however deep.
    let deep = format!(r#"{{"x":{}{}}}"#, "[".repeat(1_000_000), "]".repeat(1_000_000));
    fs::write(folder.path().join(INDEX), deep).expect("a file");
    assert!(refused(folder.path()).contains("weight_map: expected one, found none"));
    let shards: Vec<_> = (0..5000).map(|i| format!(r#""t{i}":"s{i}""#)).collect();
    write_index(folder.path(), &format!("{{{}}}", shards.join(",")));
    assert!(refused(folder.path()).contains("weight_map: expected at most 4096 files, found more"));
    // An index that was never downloaded.
    fs::write(folder.path().join(INDEX), "version https://git-lfs.github.com/spec/v1\n").expect("a file");
    assert!(refused(folder.path()).contains("a Git LFS pointer"), "{}", refused(folder.path()));
}
