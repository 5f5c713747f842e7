//! The safetensors files of an export, written in one pass over the flat parameter space.
//!
//! Tensors stand in the files in the order of the flat space, so whatever part of it comes next is written where the last one
//! ended, and none is kept. Which file has which tensor is settled before: a header stands in front of its values.

use super::Dtype;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use tarazed_domain::{ParameterLayout, TensorSlot};

/// Name where one file holds all.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Which tensor is in which file, where there are several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The tensors that have a row for each token.
const BY_TOKEN: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];
/// Values converted at a time.
const CHUNK_VALUES: usize = 1 << 16;

/// A tensor of a folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: String,
    /// `[out, in]`, or `[hidden]`; rows of padding are not counted.
    pub shape: Vec<usize>,
    /// First value in the flat space.
    first: usize,
    /// One past the last.
    end: usize,
}

impl Tensor {
    /// A tensor of the layout, in a folder whose vocabulary has so many tokens.
    pub(super) fn of(slot: &TensorSlot, tokens: usize) -> Self {
        let mut shape = slot.shape.clone();
        if BY_TOKEN.contains(&slot.name.as_str()) {
            shape[0] = shape[0].min(tokens);
        }
        Self {
            name: slot.name.clone(),
            first: slot.offset,
            end: slot.offset + shape.iter().product::<usize>(),
            shape,
        }
    }

    /// Its elements in the flat space.
    #[must_use]
    pub const fn elements(&self) -> Range<usize> {
        self.first..self.end
    }

    const fn bytes(&self, dtype: Dtype) -> u64 {
        (self.end - self.first) as u64 * dtype.bytes()
    }
}

/// One file of an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WeightsFile {
    /// Its name in the folder.
    pub name: String,
    /// What it holds, in order.
    pub tensors: Vec<Tensor>,
}

/// Cuts a model into files of at most `bytes_max` bytes of values, in the order of the flat space; a tensor that has more has a
/// file of its own. `tokens` is the tokenizer's vocabulary: rows behind it are padding.
#[must_use]
pub fn plan(layout: &ParameterLayout, tokens: usize, dtype: Dtype, bytes_max: u64) -> Vec<WeightsFile> {
    let mut groups: Vec<Vec<Tensor>> = Vec::new();
    let mut room = 0;
    for tensor in layout.tensors().iter().map(|slot| Tensor::of(slot, tokens)) {
        let bytes = tensor.bytes(dtype);
        match groups.last_mut() {
            Some(group) if bytes <= room => group.push(tensor),
            _ => {
                groups.push(vec![tensor]);
                room = bytes_max;
            }
        }
        room = room.saturating_sub(bytes);
    }
    let count = groups.len();
    let name = |number: usize| match count {
        1 => SINGLE_FILE.to_owned(),
        _ => format!("model-{number:05}-of-{count:05}.safetensors"),
    };
    let files = (1..).zip(groups);
    let file = |(number, tensors)| WeightsFile {
        name: name(number),
        tensors,
    };
    files.map(file).collect()
}

/// Bytes of all values.
#[must_use]
pub fn total_bytes(files: &[WeightsFile], dtype: Dtype) -> u64 {
    let tensors = files.iter().flat_map(|file| &file.tensors);
    tensors.map(|tensor| tensor.bytes(dtype)).sum()
}

/// [`INDEX_FILE`].
#[must_use]
pub fn index(files: &[WeightsFile], dtype: Dtype) -> Value {
    let mut places = Map::new();
    for file in files {
        let names = file.tensors.iter().map(|tensor| tensor.name.clone());
        places.extend(names.map(|name| (name, json!(file.name))));
    }
    json!({"metadata": {"total_size": total_bytes(files, dtype)}, "weight_map": places})
}

/// A file's first bytes: length and JSON header, padded with spaces to 8 bytes. Readers ask for `"format": "pt"`.
fn header(file: &WeightsFile, dtype: Dtype, step: u64) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert(
        "__metadata__".to_owned(),
        json!({"format": "pt", "step": step.to_string()}),
    );
    let mut at = 0;
    for tensor in &file.tensors {
        let end = at + tensor.bytes(dtype);
        let entry = json!({"dtype": dtype.name(), "shape": tensor.shape, "data_offsets": [at, end]});
        entries.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

/// Rounds to bf16, as bits: to nearest, ties to even; a NaN stays a NaN.
const fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // Its payload may lie in the lower half alone; a set quiet bit keeps it a NaN.
        return (bits >> 16) as u16 | 0x0040;
    }
    // No finite value's bits wrap around.
    ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// A file that could not be written.
#[derive(Debug)]
pub struct WriteError {
    /// Which.
    pub path: PathBuf,
    /// Why.
    pub source: std::io::Error,
}

/// Writes the files, part after part of the flat space.
pub struct Writer<'a> {
    folder: &'a Path,
    files: &'a [WeightsFile],
    dtype: Dtype,
    step: u64,
    /// The next value wanted is this one of that tensor of that file.
    file: usize,
    tensor: usize,
    value: usize,
    open: Option<BufWriter<File>>,
    /// The next part begins here.
    seen: usize,
}

impl<'a> Writer<'a> {
    /// For the checkpoint of `step`; makes no file yet.
    #[must_use]
    pub const fn new(folder: &'a Path, files: &'a [WeightsFile], dtype: Dtype, step: u64) -> Self {
        Self {
            folder,
            files,
            dtype,
            step,
            file: 0,
            tensor: 0,
            value: 0,
            open: None,
            seen: 0,
        }
    }

    /// Writes what of this part belongs to a tensor.
    ///
    /// # Errors
    /// The file that could not be written; nothing that was written then counts.
    ///
    /// # Panics
    /// If the part does not follow the one before: the caller's error.
    pub fn push(&mut self, first: usize, values: &[f32]) -> Result<(), WriteError> {
        assert_eq!(first, self.seen, "parts of the flat space follow each other");
        let files = self.files;
        self.seen += values.len();
        while let Some(file) = files.get(self.file) {
            let tensor = &file.tensors[self.tensor];
            let from = tensor.first + self.value;
            let to = tensor.end.min(self.seen);
            if from >= to {
                break; // it begins in a later part
            }
            self.write(file, &values[from - first..to - first])
                .map_err(|source| WriteError {
                    path: self.folder.join(&file.name),
                    source,
                })?;
            self.value += to - from;
            if to == tensor.end {
                self.next_tensor(file)?;
            }
        }
        Ok(())
    }

    /// All parts have come.
    ///
    /// # Panics
    /// If a tensor is not whole: the caller's error, who knows how long the flat space is.
    pub fn finish(self) {
        assert_eq!(self.file, self.files.len(), "the flat space holds every tensor");
    }

    fn write(&mut self, file: &WeightsFile, values: &[f32]) -> std::io::Result<()> {
        let out = match &mut self.open {
            Some(out) => out,
            None => {
                let mut out = BufWriter::new(File::create_new(self.folder.join(&file.name))?);
                out.write_all(&header(file, self.dtype, self.step))?;
                self.open.insert(out)
            }
        };
        let mut bytes = Vec::with_capacity(CHUNK_VALUES.min(values.len()) * 4);
        for chunk in values.chunks(CHUNK_VALUES) {
            bytes.clear();
            match self.dtype {
                Dtype::F32 => bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes())),
                Dtype::Bf16 => bytes.extend(chunk.iter().flat_map(|value| bf16(*value).to_le_bytes())),
            }
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Goes on to the next tensor; a file that is whole is put on the disk.
    fn next_tensor(&mut self, file: &WeightsFile) -> Result<(), WriteError> {
        self.value = 0;
        self.tensor += 1;
        if self.tensor < file.tensors.len() {
            return Ok(());
        }
        self.tensor = 0;
        self.file += 1;
        let Some(out) = self.open.take() else { return Ok(()) };
        let synced = out.into_inner().map_err(std::io::IntoInnerError::into_error);
        synced.and_then(|file| file.sync_all()).map_err(|source| WriteError {
            path: self.folder.join(&file.name),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 5 rows of 2, of which 3 stand for tokens; 4 values; a norm of 2 behind the padding to blocks of 8; the head.
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

    fn names(files: &[WeightsFile]) -> Vec<Vec<&str>> {
        let mut found = Vec::new();
        for file in files {
            found.push(file.tensors.iter().map(|tensor| tensor.name.as_str()).collect());
        }
        found
    }

    #[test]
    fn a_file_holds_no_more_than_it_may_or_one_tensor() {
        let one = plan(&layout(), 3, Dtype::F32, 72);
        assert_eq!((one.len(), one[0].name.as_str()), (1, SINGLE_FILE));
        assert_eq!(total_bytes(&one, Dtype::F32), 4 * (6 + 4 + 6 + 2));
        let two = plan(&layout(), 3, Dtype::F32, 40);
        assert_eq!(
            names(&two),
            [
                ["model.embed_tokens.weight", "a.weight"],
                ["lm_head.weight", "model.norm.weight"]
            ]
        );
        assert_eq!(two[1].name, "model-00002-of-00002.safetensors");
        // Half the bytes a value, half the files.
        assert_eq!(plan(&layout(), 3, Dtype::Bf16, 36).len(), 1);
        assert_eq!(plan(&layout(), 3, Dtype::F32, 1).len(), 4);
        let places = &index(&two, Dtype::F32);
        assert_eq!(places["metadata"]["total_size"], 72);
        assert_eq!(places["weight_map"]["model.norm.weight"], two[1].name.as_str());
    }

    /// However the flat space is cut, the files are the same: what is in no tensor, padding, is left out.
    #[test]
    fn parts_of_any_size_give_the_same_files() {
        let layout = layout();
        let flat: Vec<f32> = (0..layout.flat_elements()).map(|value| value as f32).collect();
        let files = plan(&layout, 3, Dtype::F32, 40);
        let mut seen = Vec::new();
        for part in [1, 3, 7, flat.len()] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let mut writer = Writer::new(folder.path(), &files, Dtype::F32, 9);
            for (number, values) in flat.chunks(part).enumerate() {
                writer.push(number * part, values).expect("written");
            }
            writer.finish();
            let read = |file: &WeightsFile| std::fs::read(folder.path().join(&file.name)).expect("a file");
            seen.push(files.iter().map(read).collect::<Vec<_>>());
        }
        assert!(seen.iter().all(|files| *files == seen[0]));
        let values = |file: usize| -> Vec<f32> {
            let bytes = &seen[0][file];
            let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
            let values = &rest[u64::from_le_bytes(*length) as usize..];
            let value = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
            values.chunks_exact(4).map(value).collect()
        };
        let expected = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13].map(|value| value as f32);
        assert_eq!(values(0), expected);
        assert_eq!(values(1), [14, 15, 16, 17, 18, 19, 24, 25].map(|value| value as f32));
    }

    #[test]
    fn bf16_goes_to_the_nearest_and_ties_to_even() {
        for (bits, rounded) in [
            (0x3F80_0000, 0x3F80),
            (0x3F80_7FFF, 0x3F80),
            (0x3F80_8000, 0x3F80),
            (0x3F80_8001, 0x3F81),
            (0x3F81_8000, 0x3F82),
            (0xBF81_8000, 0xBF82),
            (0x8000_0000, 0x8000),
            (0x0000_8001, 0x0001),
            (0x7F7F_FFFF, 0x7F80),
            (0xFF80_0000, 0xFF80),
        ] {
            assert_eq!(bf16(f32::from_bits(bits)), rounded, "{bits:#x}");
        }
        let nan = bf16(f32::from_bits(0x7F80_0001));
        assert!(f32::from_bits(u32::from(nan) << 16).is_nan());
    }
}
