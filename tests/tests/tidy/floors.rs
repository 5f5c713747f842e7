//! Crates: which may depend on which (DESIGN.md section 12).

use super::source::{code_lines, files};
use super::{assert_tidy, root};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Floor and folder of every crate (DESIGN.md section 12). A dependency points to a strictly lower floor.
const FLOORS: [(&str, u8, &str); 14] = [
    ("tarazed-domain", 0, "runtime/domain"),
    ("tarazed-protocol", 1, "runtime/protocol"),
    ("tarazed-kernels", 1, "kernels"),
    ("tarazed-model", 2, "runtime/model"),
    ("tarazed-store", 2, "runtime/store"),
    ("tarazed-corpus", 2, "runtime/corpus"),
    ("tarazed-fabric", 2, "runtime/fabric"),
    ("tarazed-train", 3, "runtime/train"),
    ("tarazed-actors", 4, "actors"),
    ("tarazed", 5, "runtime/tarazed"),
    ("tarazed-chaos", 5, "chaos"),
    ("tarazed-verify", 5, "chaos/verify"),
    // It needs nobody; the tests, one floor up, start it.
    ("tarazed-s3", 5, "tests/s3"),
    ("tarazed-tests", 6, "tests"),
];

/// Judges what runs leave behind, and so shares nothing with them: neither a crate of the workspace nor the serializer of
/// their formats.
const INDEPENDENT: &str = "tarazed-verify";
const SERIALIZERS: [&str; 5] = ["bytecheck", "rkyv", "rkyv_derive", "safetensors", "serde"];

/// A crate of the workspace: its folder and the crates of the workspace it depends on, in any way.
type Crates = BTreeMap<String, (String, Vec<String>)>;

fn workspace_crates() -> Crates {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let list = |value: &Value| value.as_array().expect("a list").clone();
    list(&metadata["packages"])
        .iter()
        .map(|package| {
            let manifest = PathBuf::from(text(&package["manifest_path"]))
                .canonicalize()
                .expect("a manifest");
            let folder = manifest
                .parent()
                .expect("a folder")
                .strip_prefix(root())
                .expect("below the root")
                .to_owned();
            let local = list(&package["dependencies"])
                .into_iter()
                .filter(|d| d["path"].is_string());
            let dependencies = local.map(|d| text(&d["name"])).collect();
            (
                text(&package["name"]),
                (folder.to_string_lossy().into_owned(), dependencies),
            )
        })
        .collect()
}

fn floor_complaints(crates: &Crates) -> Vec<String> {
    let floor = |name: &str| {
        FLOORS
            .iter()
            .find(|(known, _, _)| *known == name)
            .map(|(_, floor, _)| *floor)
    };
    let mut complaints = Vec::new();
    for (name, _, folder) in FLOORS {
        match crates.get(name) {
            None => complaints.push(format!("{name} stands in the table of floors and not in the workspace")),
            Some((place, _)) if place != folder => complaints.push(format!("{name} is in {place}, not in {folder}")),
            Some(_) => {}
        }
    }
    for (name, (_, dependencies)) in crates {
        let Some(upper) = floor(name) else {
            complaints.push(format!("{name} has no floor"));
            continue;
        };
        for dependency in dependencies {
            match floor(dependency) {
                Some(lower) if lower < upper => {}
                Some(lower) => complaints.push(format!(
                    "{name} (floor {upper}) depends on {dependency} (floor {lower}): dependencies point to lower floors"
                )),
                None => complaints.push(format!("{name} depends on {dependency}, which has no floor")),
            }
        }
    }
    complaints
}

#[test]
fn dependencies_point_to_lower_floors() {
    assert_tidy(&floor_complaints(&workspace_crates()));
}

#[test]
fn links_up_and_sideways_are_found() {
    let with = |name: &str, dependency: &str| {
        let mut crates = workspace_crates();
        crates
            .get_mut(name)
            .expect("a known crate")
            .1
            .push(dependency.to_owned());
        floor_complaints(&crates).join("\n")
    };
    assert!(
        with("tarazed-domain", "tarazed-train").contains("tarazed-domain (floor 0) depends on tarazed-train (floor 3)")
    );
    assert!(
        with("tarazed-model", "tarazed-store").contains("tarazed-model (floor 2) depends on tarazed-store (floor 2)")
    );
    assert!(with("tarazed-tests", "tarazed-new").contains("tarazed-new, which has no floor"));
    assert!(
        floor_complaints(&Crates::new())
            .iter()
            .any(|c| c.starts_with("tarazed-domain stands in the table"))
    );
}

/// What the verifier asks for that it must not have, by name: crates of the workspace, and serializers.
fn independence_complaints(crates: &Crates, asked_for: &[String]) -> Vec<String> {
    let shared = |name: &&String| crates.contains_key(*name) || SERIALIZERS.contains(&name.as_str());
    let complain = |name: &String| format!("{INDEPENDENT} depends on {name}: it judges by code of its own");
    asked_for.iter().filter(shared).map(complain).collect()
}

#[test]
fn the_verifier_shares_no_code_with_what_it_judges() {
    let crates = workspace_crates();
    let (folder, _) = crates.get(INDEPENDENT).expect("the verifier");
    let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("its manifest");
    let manifest: toml::Table = toml::from_str(&manifest).expect("TOML");
    let mut asked_for = Vec::new();
    for (section, table) in &manifest {
        assert_ne!(
            section, "target",
            "dependencies of one target alone are not looked at here"
        );
        if let (true, Some(table)) = (section.ends_with("dependencies"), table.as_table()) {
            asked_for.extend(table.keys().cloned());
            let renamed = table.values().any(|value| value.get("package").is_some());
            assert!(!renamed, "a renamed dependency would hide what it is");
        }
    }
    assert!(asked_for.contains(&"blake3".to_owned()), "{asked_for:?}");
    assert_tidy(&independence_complaints(&crates, &asked_for));
    // And no source of another crate is read in as text or module.
    for file in files(&[".rs"])
        .iter()
        .filter(|file| file.path.starts_with("chaos/verify/"))
    {
        for line in code_lines(&file.text) {
            assert!(
                !line.contains("include!") && !line.contains("#[path"),
                "{}: {line}",
                file.path
            );
        }
    }
    for bad in ["tarazed-store", "rkyv"] {
        assert_eq!(independence_complaints(&crates, &[bad.to_owned()]).len(), 1, "{bad}");
    }
}
