//! The weights of a Hugging Face folder, read where the flat parameter space wants them: the way back of [`super::weights`].
//!
//! All headers are read first, and every tensor of the model must be in exactly one file, with its shape, and nothing else. Values
//! are then read a piece at a time, so that neither a file nor a tensor must fit into memory, and the folder may have its tensors
//! in any order and in any number of files.

use super::header::{self, Entry, HeaderError, Stored};
use super::weights::{INDEX_FILE, SINGLE_FILE, Tensor};
use crate::exit::{Failure, is_of_the_place};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tarazed_domain::ParameterLayout;

/// Values read at a time.
const CHUNK_VALUES: usize = 1 << 18;
/// Bytes of an index.
const INDEX_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Names in one message.
const NAMES_MAX: usize = 3;
/// How tensors end that older versions of transformers saved with a model: what follows from `rope_theta` alone, and what they
/// themselves leave unread.
const UNREAD: &str = ".self_attn.rotary_emb.inv_freq";

/// Where a tensor's values are.
struct Place {
    /// Of the files.
    file: usize,
    /// First byte.
    at: u64,
    stored: Stored,
}

/// The open files of a folder, and each tensor's place in them.
pub struct Tensors {
    files: Vec<(PathBuf, File)>,
    /// In the order of the flat space.
    tensors: Vec<(Tensor, Place)>,
}

impl Tensors {
    /// Opens the folder's files and reads their headers. `tokens` is its vocabulary: so many rows embedding and head have there,
    /// whatever they have in the layout.
    ///
    /// # Errors
    /// Refused where a file is none, or tensors are missing, strange or of another shape, by name; else by what reading says.
    pub fn open(folder: &Path, layout: &ParameterLayout, tokens: usize) -> Result<Self, Failure> {
        let index = Index::of(folder)?;
        let mut files = Vec::new();
        let mut held: BTreeMap<String, (usize, Entry)> = BTreeMap::new();
        for name in &index.files {
            let path = folder.join(name);
            let file = File::open(&path).map_err(|e| cannot_read(&path, &e))?;
            let entries = header::read(&file).map_err(|error| match error {
                HeaderError::Io(error) => cannot_read(&path, &error),
                HeaderError::Bad(why) => damaged(&path, why),
            })?;
            for entry in entries {
                index.check(name, &entry.name)?;
                let tensor = entry.name.clone();
                if held.insert(tensor.clone(), (files.len(), entry)).is_some() {
                    return Err(damaged(&path, format!("tensor {tensor} is in another file, too")));
                }
            }
            files.push((path, file));
        }
        index.check_whole(&held)?;
        let tensors = placed(folder, layout, tokens, held)?;
        Ok(Self { files, tensors })
    }

    /// What the values are stored as: all that occur.
    #[must_use]
    pub fn stored(&self) -> Vec<Stored> {
        let mut found = Vec::new();
        for (_, place) in &self.tensors {
            if !found.contains(&place.stored) {
                found.push(place.stored);
            }
        }
        found
    }

    /// Files that hold them.
    #[must_use]
    pub const fn files(&self) -> usize {
        self.files.len()
    }

    /// Reads all values and keeps none.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn check_values(&self) -> Result<(), Failure> {
        let mut chunk = vec![0.0; CHUNK_VALUES];
        for (tensor, _) in &self.tensors {
            let Range { start, end } = tensor.elements();
            for first in (start..end).step_by(CHUNK_VALUES) {
                let count = CHUNK_VALUES.min(end - first);
                self.read(first, &mut chunk[..count])?;
            }
        }
        Ok(())
    }

    /// Lays the values of the flat space from element `first` on into `out`; what belongs to no tensor of the folder is zero.
    ///
    /// # Errors
    /// Refused for a value that is not finite, by its tensor and place; else by what reading says.
    pub fn read(&self, first: usize, out: &mut [f32]) -> Result<(), Failure> {
        out.fill(0.0);
        let end = first + out.len();
        let from = self
            .tensors
            .partition_point(|(tensor, _)| tensor.elements().end <= first);
        for (tensor, place) in &self.tensors[from..] {
            let of = tensor.elements();
            if of.start >= end {
                break;
            }
            let (start, stop) = (of.start.max(first), of.end.min(end));
            let into = &mut out[start - first..stop - first];
            self.read_tensor(tensor, place, start - of.start, into)?;
        }
        Ok(())
    }

    /// Values of one tensor, from one of them on.
    fn read_tensor(&self, tensor: &Tensor, place: &Place, skip: usize, out: &mut [f32]) -> Result<(), Failure> {
        let (path, file) = &self.files[place.file];
        let width = place.stored.bytes();
        let mut bytes = vec![0; CHUNK_VALUES.min(out.len()) * width as usize];
        let mut at = skip;
        for chunk in out.chunks_mut(CHUNK_VALUES) {
            let bytes = &mut bytes[..chunk.len() * width as usize];
            file.read_exact_at(bytes, place.at + at as u64 * width)
                .map_err(|e| cannot_read(path, &e))?;
            place.stored.widen(bytes, chunk);
            if let Some(index) = chunk.iter().position(|value| !value.is_finite()) {
                let cause = format!("value {} of tensor {} is {}", at + index, tensor.name, chunk[index]);
                let remedy = "a model with such a weight computes nothing: give one whose weights are all finite";
                return Err(Failure::refused(path.display(), cause, remedy));
            }
            at += chunk.len();
        }
        Ok(())
    }
}

/// Which tensors of a layout the folder has, and where; every one of them, and no other.
fn placed(
    folder: &Path,
    layout: &ParameterLayout,
    tokens: usize,
    mut held: BTreeMap<String, (usize, Entry)>,
) -> Result<Vec<(Tensor, Place)>, Failure> {
    let (mut placed, mut missing) = (Vec::new(), Vec::new());
    for slot in layout.tensors() {
        let tensor = Tensor::of(slot, tokens);
        let Some((file, entry)) = held.remove(&tensor.name) else {
            missing.push(tensor.name);
            continue;
        };
        if entry.shape != tensor.shape {
            let cause = format!(
                "tensor {} has the shape {:?}, and config.json speaks of {:?}",
                tensor.name, entry.shape, tensor.shape
            );
            let remedy = "give a folder whose config.json is that of its weights";
            return Err(Failure::refused(folder.display(), cause, remedy));
        }
        let place = Place {
            file,
            at: entry.at,
            stored: entry.stored,
        };
        placed.push((tensor, place));
    }
    let refused = |what: &str, names: &[String]| {
        let remedy = "give a folder of a whole LlamaForCausalLM whose config.json is that of its weights";
        Err(Failure::refused(
            folder.display(),
            format!("{what}: {}", listed(names)),
            remedy,
        ))
    };
    if !missing.is_empty() {
        return refused("tensors of the model are missing", &missing);
    }
    held.retain(|name, _| !name.ends_with(UNREAD));
    if !held.is_empty() {
        let names: Vec<String> = held.into_keys().collect();
        return refused("the model has no such tensors", &names);
    }
    Ok(placed)
}

/// Which files a folder's weights are in.
struct Index {
    path: PathBuf,
    files: Vec<String>,
    /// The file of each tensor, where there are several files.
    places: Option<BTreeMap<String, String>>,
}

impl Index {
    /// One file where it is there, else those of the index: so does transformers.
    fn of(folder: &Path) -> Result<Self, Failure> {
        if folder.join(SINGLE_FILE).is_file() {
            return Ok(Self {
                path: folder.join(SINGLE_FILE),
                files: vec![SINGLE_FILE.to_owned()],
                places: None,
            });
        }
        let path = folder.join(INDEX_FILE);
        if !path.is_file() {
            let cause = format!("holds neither {SINGLE_FILE} nor {INDEX_FILE}");
            let remedy =
                "give a folder of safetensors files; other kinds of weights can be saved as such by transformers";
            return Err(Failure::refused(folder.display(), cause, remedy));
        }
        let text = small_file(&path, INDEX_BYTES_MAX)?;
        let index: Value = serde_json::from_slice(&text).map_err(|e| damaged(&path, format!("is no JSON ({e})")))?;
        let Some(map) = index["weight_map"].as_object() else {
            return Err(damaged(&path, "has no weight_map"));
        };
        let mut places = BTreeMap::new();
        for (tensor, file) in map {
            let Some(file) = file.as_str().filter(|file| is_plain_name(file)) else {
                return Err(damaged(
                    &path,
                    format!("names {file} as a file of the folder, for tensor {tensor}"),
                ));
            };
            places.insert(tensor.clone(), file.to_owned());
        }
        let mut files: Vec<String> = places.values().cloned().collect();
        files.sort_unstable();
        files.dedup();
        Ok(Self {
            path,
            files,
            places: Some(places),
        })
    }

    /// Whether a tensor is where the index says.
    fn check(&self, file: &str, tensor: &str) -> Result<(), Failure> {
        let Some(places) = &self.places else { return Ok(()) };
        match places.get(tensor) {
            Some(place) if place == file => Ok(()),
            Some(place) => {
                let cause = format!("names {place} for tensor {tensor}, which is in {file}");
                Err(damaged(&self.path, cause))
            }
            None => Err(damaged(
                &self.path,
                format!("does not know tensor {tensor}, which is in {file}"),
            )),
        }
    }

    /// Whether every tensor of the index is there.
    fn check_whole(&self, held: &BTreeMap<String, (usize, Entry)>) -> Result<(), Failure> {
        let named = self.places.iter().flat_map(BTreeMap::keys);
        let absent: Vec<String> = named.filter(|tensor| !held.contains_key(*tensor)).cloned().collect();
        if absent.is_empty() {
            return Ok(());
        }
        let cause = format!("names tensors that their files do not hold: {}", listed(&absent));
        Err(damaged(&self.path, cause))
    }
}

/// A name inside the folder: nothing else of the machine is read by what an index says.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let first = parts.next();
    matches!(first, Some(std::path::Component::Normal(part)) if part == name) && parts.next().is_none()
}

/// A small file of the folder.
///
/// # Errors
/// Refused where it is not there, cannot be read or is larger; else by what reading says.
pub fn small_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>, Failure> {
    let length = std::fs::metadata(path).map_err(|e| cannot_read(path, &e))?.len();
    if length > bytes_max {
        let cause = format!("{length} bytes, more than such a file has");
        return Err(damaged(path, cause));
    }
    std::fs::read(path).map_err(|e| cannot_read(path, &e))
}

fn damaged(path: &Path, cause: impl std::fmt::Display) -> Failure {
    let remedy = "fetch or write the folder again: it is not as it was made";
    Failure::refused(path.display(), cause, remedy)
}

/// What a folder is, no retry changes; what a disk or a network does may pass.
fn cannot_read(path: &Path, error: &std::io::Error) -> Failure {
    let remedy = "give a folder with all its files, which this user may read";
    match is_of_the_place(error) || error.kind() == ErrorKind::UnexpectedEof {
        true => Failure::refused(path.display(), format!("cannot be read ({error})"), remedy),
        false => Failure::io(path.display(), error, "cannot be read", remedy),
    }
}

fn listed(names: &[String]) -> String {
    let shown = names[..names.len().min(NAMES_MAX)].join(", ");
    match names.len().saturating_sub(NAMES_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Dtype;
    use super::super::weights::{Writer, index, plan};
    use super::*;
    use crate::exit::Exit;
    use proptest::prelude::*;
    use serde_json::{Map, json};

    /// 5 rows of 2, of which a folder may have fewer; 4 values; a norm of 2 behind the padding to blocks of 8; the head.
    fn layout() -> ParameterLayout {
        let tensors = [
            ("model.embed_tokens.weight", vec![5, 2], true),
            ("a.weight", vec![2, 2], true),
            ("model.norm.weight", vec![2], false),
            ("lm_head.weight", vec![5, 2], true),
        ];
        let tensors = tensors.map(|(name, shape, decays)| (name.to_owned(), shape, decays));
        ParameterLayout::new(tensors, 8)
    }

    /// Name, type, shape, bytes.
    type Made = (&'static str, &'static str, Vec<usize>, Vec<u8>);

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// The tensors of [`layout`] with three tokens, in an order of their own and of three types.
    fn made() -> Vec<Made> {
        vec![
            (
                "lm_head.weight",
                "F32",
                vec![3, 2],
                f32s(&[14.0, 15.0, 16.0, 17.0, 18.0, 19.0]),
            ),
            ("model.norm.weight", "F16", vec![2], vec![0x00, 0x3C, 0x00, 0xC0]),
            (
                "a.weight",
                "BF16",
                vec![2, 2],
                vec![0x80, 0x3F, 0x00, 0x40, 0x40, 0x40, 0x80, 0x40],
            ),
            (
                "model.embed_tokens.weight",
                "F32",
                vec![3, 2],
                f32s(&[0.0, -1.0, 2.0, 3.0, 4.0, 5.0]),
            ),
        ]
    }

    fn safetensors(tensors: &[Made]) -> Vec<u8> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut values = Vec::new();
        for (name, dtype, shape, bytes) in tensors {
            let end = values.len() + bytes.len();
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [values.len(), end]});
            header.insert((*name).to_owned(), entry);
            values.extend_from_slice(bytes);
        }
        let header = Value::Object(header).to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &values].concat()
    }

    fn folder_of(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).expect("written");
        }
        folder
    }

    fn read_all(tensors: &Tensors, layout: &ParameterLayout) -> Result<Vec<f32>, Failure> {
        let mut flat = vec![f32::NAN; layout.flat_elements()];
        tensors.read(0, &mut flat).map(|()| flat)
    }

    #[test]
    fn any_order_and_any_type_is_read_and_new_rows_are_zero() {
        let expected = [
            &[0.0, -1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0][..],
            &[1.0, 2.0, 3.0, 4.0],
            &[14.0, 15.0, 16.0, 17.0, 18.0, 19.0, 0.0, 0.0, 0.0, 0.0],
            &[1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
        .concat();
        let layout = layout();
        let one = folder_of(&[("model.safetensors", safetensors(&made()))]);
        let map = |names: [&str; 4]| {
            let map: Map<String, Value> = made()
                .iter()
                .zip(names)
                .map(|(it, file)| (it.0.to_owned(), json!(file)))
                .collect();
            json!({"metadata": {"total_size": 7}, "weight_map": map})
                .to_string()
                .into_bytes()
        };
        let several = folder_of(&[
            ("x.safetensors", safetensors(&made()[..1])),
            ("y.safetensors", safetensors(&made()[1..])),
            (
                INDEX_FILE,
                map(["x.safetensors", "y.safetensors", "y.safetensors", "y.safetensors"]),
            ),
        ]);
        for (folder, files) in [(&one, 1), (&several, 2)] {
            let tensors = Tensors::open(folder.path(), &layout, 3).expect("a good folder");
            tensors.check_values().expect("finite");
            assert_eq!(read_all(&tensors, &layout).expect("read"), expected);
            assert_eq!((tensors.files(), tensors.stored().len()), (files, 3));
        }
    }

    /// What older versions of transformers saved besides is not the model's.
    #[test]
    fn frequencies_that_follow_from_the_base_are_left_unread() {
        let mut tensors = made();
        let nan = f32::NAN.to_le_bytes().to_vec();
        tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", vec![1], nan));
        let folder = folder_of(&[("model.safetensors", safetensors(&tensors))]);
        let opened = Tensors::open(folder.path(), &layout(), 3).expect("a good folder");
        opened.check_values().expect("they are not among the values");
    }

    /// What is refused is refused with its name, and before any value is used.
    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let said = |files: &[(&str, Vec<u8>)]| {
            let folder = folder_of(files);
            let opened = Tensors::open(folder.path(), &layout(), 3);
            let failure = opened.and_then(|tensors| tensors.check_values()).expect_err("refused");
            assert_eq!(failure.exit, Exit::Refused, "{failure}");
            failure.message
        };
        let changed = |change: fn(&mut Vec<Made>)| {
            let mut tensors = made();
            change(&mut tensors);
            said(&[("model.safetensors", safetensors(&tensors))])
        };
        let message = changed(|tensors| drop(tensors.pop()));
        assert!(message.contains("missing: model.embed_tokens.weight"), "{message}");
        let message = changed(|tensors| tensors.push(("b.bias", "F32", vec![1], vec![0; 4])));
        assert!(message.contains("no such tensors: b.bias"), "{message}");
        let message = changed(|tensors| tensors.push(("rotary_emb.inv_freq", "F32", vec![1], vec![0; 4])));
        assert!(message.contains("no such tensors: rotary_emb.inv_freq"), "{message}");
        let message = changed(|tensors| tensors[1].2 = vec![1, 2]);
        assert!(
            message.contains("tensor model.norm.weight has the shape [1, 2]"),
            "{message}"
        );
        let message = changed(|tensors| tensors[0].3[20..24].copy_from_slice(&f32::NAN.to_le_bytes()));
        assert!(message.contains("value 5 of tensor lm_head.weight is NaN"), "{message}");
        let message = changed(|tensors| tensors[1].3[..2].copy_from_slice(&[0x00, 0xFC]));
        assert!(
            message.contains("value 0 of tensor model.norm.weight is -inf"),
            "{message}"
        );

        let mut cut = safetensors(&made());
        cut.truncate(cut.len() - 3);
        assert!(said(&[("model.safetensors", cut)]).contains("it is not whole"));
        assert!(said(&[]).contains("holds neither model.safetensors nor"));
        let index = |map: Value| (INDEX_FILE, json!({"weight_map": map}).to_string().into_bytes());
        for (files, part) in [
            (vec![(INDEX_FILE, b"{".to_vec())], "is no JSON"),
            (vec![(INDEX_FILE, b"{}".to_vec())], "has no weight_map"),
            (
                vec![index(json!({"a.weight": "../x.safetensors"}))],
                "for tensor a.weight",
            ),
            (
                vec![index(json!({"a.weight": "/x.safetensors"}))],
                "for tensor a.weight",
            ),
            (vec![index(json!({"a.weight": 7}))], "for tensor a.weight"),
            (vec![index(json!({"a.weight": "x\u{0}"}))], "cannot be read"),
            (vec![index(json!({"a.weight": "x".repeat(300)}))], "cannot be read"),
            (
                vec![index(json!({"a.weight": "x.safetensors"}))],
                "x.safetensors: cannot be read",
            ),
            (
                vec![index(json!({"a.weight": "x"})), ("x", safetensors(&made()[..1]))],
                "does not know tensor lm_head.weight",
            ),
            (
                vec![
                    index(json!({"lm_head.weight": "x", "model.norm.weight": "y"})),
                    ("x", safetensors(&made()[1..2])),
                    ("y", safetensors(&made()[..1])),
                ],
                "names y for tensor model.norm.weight, which is in x",
            ),
            (
                vec![
                    index(json!({"lm_head.weight": "x", "a": "x", "b": "x", "c": "x", "d": "x"})),
                    ("x", safetensors(&made()[..1])),
                ],
                "do not hold: a, b, c and 1 more",
            ),
        ] {
            let message = said(&files);
            assert!(message.contains(part), "{part}: {message}");
        }
    }

    proptest! {
        // What is exported in f32 comes back bit for bit, whatever the files, the rows and the pieces.
        #[test]
        fn an_export_comes_back_bit_for_bit(
            bits in proptest::collection::vec(any::<u32>(), 40),
            tokens in 1_usize..=5,
            file_bytes in 1_u64..200,
            part in 1_usize..50,
        ) {
            let layout = layout();
            let finite = |bits: u32| match f32::from_bits(bits) {
                value if value.is_finite() => value,
                _ => f32::from_bits(bits & 0xFF7F_FFFF),
            };
            let mut flat: Vec<f32> = bits.into_iter().map(finite).collect();
            flat.truncate(layout.flat_elements());
            let files = plan(&layout, tokens, Dtype::F32, file_bytes);
            let folder = tempfile::tempdir().expect("a temporary folder");
            let mut writer = Writer::new(folder.path(), &files, Dtype::F32, 0);
            writer.push(0, &flat).expect("written");
            writer.finish();
            if files.len() > 1 {
                let text = index(&files, Dtype::F32).to_string();
                std::fs::write(folder.path().join(INDEX_FILE), text).expect("written");
            }
            let tensors = Tensors::open(folder.path(), &layout, tokens).expect("a good folder");
            tensors.check_values().expect("finite");
            let mut back = vec![f32::NAN; flat.len()];
            for (number, values) in back.chunks_mut(part).enumerate() {
                tensors.read(number * part, values).expect("read");
            }
            let mut is_held = vec![false; flat.len()];
            for slot in layout.tensors() {
                is_held[Tensor::of(slot, tokens).elements()].fill(true);
            }
            for (at, (value, expected)) in back.iter().zip(&flat).enumerate() {
                let expected = if is_held[at] { expected.to_bits() } else { 0 };
                prop_assert_eq!(value.to_bits(), expected, "element {}", at);
            }
        }
    }
}
