//! A prepared data set: `data.json`, and the token shards that it names.
//!
//! Every byte that samples come from is hashed: the version over `data.json`, each shard's header by `data.json`, its
//! chunk table by the header, its chunks by the table. Shards are read in chunks; memory does not grow with them.

use crate::json::{Json, from_hex};
use crate::report::{Findings, Unusable};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const DATA_FILE: &str = "data.json";
const DATA_BYTES_MAX: u64 = 256 * 1024 * 1024;
const SCHEMA: u64 = 1;
const MAGIC: &[u8; 8] = b"TZTOKENS";
const HEADER_BYTES: usize = 128;
const CHUNK_BYTES: u64 = 256 * 1024;

/// Whole sequences of one domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Domain {
    pub name: String,
    pub train_sequences: u64,
    pub train_tokens: u64,
    pub held_out_sequences: u64,
}

/// One data set, as its `data.json` describes it.
#[derive(Debug)]
pub struct DataSet {
    pub folder: PathBuf,
    pub domains: Vec<Domain>,
    /// BLAKE3 of the version's text: what goes into every line's `data`.
    pub version: [u8; 32],
    vocabulary: u64,
    shards: Vec<Shard>,
    /// All other files: name, length, BLAKE3.
    files: Vec<(String, u64, [u8; 32])>,
    /// Every split of every domain: its name, and its tokens.
    splits: Vec<(String, u64)>,
}

/// One token shard, as `data.json` names it.
#[derive(Debug)]
struct Shard {
    name: String,
    bytes: u64,
    /// BLAKE3 of its header.
    header: [u8; 32],
    /// Index of the split that it is a part of.
    split: usize,
}

/// All data sets of a run folder.
pub fn find(run_dir: &Path) -> Result<Vec<PathBuf>, Unusable> {
    let data = run_dir.join("data");
    let entries = std::fs::read_dir(&data).map_err(|why| Unusable(format!("{}: {why}", data.display())))?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    found.retain(|folder| folder.join(DATA_FILE).is_file());
    found.sort();
    if found.is_empty() {
        return Err(Unusable(format!("{}: no folder with a {DATA_FILE}", data.display())));
    }
    Ok(found)
}

impl DataSet {
    /// Reads `data.json` of a folder.
    pub fn load(folder: &Path, context: u64) -> Result<Self, String> {
        let path = folder.join(DATA_FILE);
        let length = std::fs::metadata(&path).map_err(|why| why.to_string())?.len();
        if length > DATA_BYTES_MAX {
            return Err(format!("{length} bytes are too many"));
        }
        let bytes = std::fs::read(&path).map_err(|why| why.to_string())?;
        let json = Json::parse(&bytes)?;
        if json.get("schema")?.count()? != SCHEMA {
            return Err("another schema than 1".into());
        }
        let version = json.get("version")?.text()?.to_owned();
        from_hex::<32>(&version)?;
        if blake3::hash(bare(&json)?.print().as_bytes()).to_hex().as_str() != version {
            return Err("its version is not the hash of its content".into());
        }
        let mut set = Self {
            folder: folder.to_owned(),
            domains: Vec::new(),
            version: *blake3::hash(version.as_bytes()).as_bytes(),
            shards: Vec::new(),
            files: vec![file(json.get("tokenizer")?.get("file")?)?],
            vocabulary: json.get("tokenizer")?.get("vocabulary")?.count()?,
            splits: Vec::new(),
        };
        for domain in json.get("domains")?.list()? {
            let name = domain.get("name")?.text()?.to_owned();
            set.files.push(file(domain.get("documents")?)?);
            let (mut sequences, mut split_tokens) = ([0; 2], [0; 2]);
            let counts = sequences.iter_mut().zip(&mut split_tokens);
            for (split, (count, stated)) in ["train", "held_out"].into_iter().zip(counts) {
                let part = domain.get(split)?;
                let tokens = part.get("tokens")?.count()?;
                *stated = tokens;
                *count = tokens.saturating_sub(1) / context;
                for shard in part.get("shards")?.list()? {
                    let (name, bytes, header) = file(shard)?;
                    let split = set.splits.len();
                    set.shards.push(Shard {
                        name,
                        bytes,
                        header,
                        split,
                    });
                }
                set.splits.push((format!("{name}, {split}"), tokens));
            }
            set.domains.push(Domain {
                name,
                train_sequences: sequences[0],
                train_tokens: split_tokens[0],
                held_out_sequences: sequences[1],
            });
        }
        Ok(set)
    }

    /// BLAKE3 of the tokenizer's file.
    pub fn tokenizer(&self) -> [u8; 32] {
        self.files[0].2 // the first that `load` puts there
    }

    /// Reads every file it names, and reports what is not as it says.
    pub fn check_files(&self, findings: &mut Findings) -> u64 {
        let mut hashed = 0;
        for (name, bytes, digest) in &self.files {
            match hash_file(&self.folder.join(name)) {
                Ok((length, hash)) if (length, hash) == (*bytes, *digest) => hashed += length,
                Ok(_) => findings.add(name, "not the file that data.json names"),
                Err(why) => findings.add(name, why),
            }
        }
        // None where a shard is bad: that is reported, and its tokens cannot be counted.
        let mut tokens = vec![Some(0_u64); self.splits.len()];
        for shard in &self.shards {
            match check_shard(&self.folder.join(&shard.name), shard, self.vocabulary) {
                Ok(count) => {
                    tokens[shard.split] = tokens[shard.split].map(|sum| sum + count);
                    hashed += shard.bytes;
                }
                Err(why) => {
                    findings.add(&shard.name, why);
                    tokens[shard.split] = None;
                }
            }
        }
        for ((name, stated), counted) in self.splits.iter().zip(tokens) {
            if let Some(counted) = counted.filter(|counted| counted != stated) {
                findings.add(DATA_FILE, format!("{name}: {stated} tokens, its shards hold {counted}"));
            }
        }
        hashed
    }
}

/// The same document with an empty version and without those of its domains: what the version is the hash of, in its shortest
/// form.
fn bare(json: &Json) -> Result<Json, String> {
    let mut fields = json.object()?.to_vec();
    for (key, value) in &mut fields {
        if key == "version" {
            *value = Json::Text(String::new());
        } else if key == "domains" {
            let domains = value.list()?.iter().map(|domain| {
                let fields = domain.object()?.iter().filter(|(key, _)| key != "version");
                Ok(Json::Object(fields.cloned().collect()))
            });
            *value = Json::List(domains.collect::<Result<_, String>>()?);
        }
    }
    Ok(Json::Object(fields))
}

fn file(json: &Json) -> Result<(String, u64, [u8; 32]), String> {
    let [name, bytes, digest] = json.exactly(["name", "bytes", "blake3"])?;
    let name = name.text()?;
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Err(format!("'{name}' is no file of the folder"));
    }
    Ok((name.to_owned(), bytes.count()?, digest.hex()?))
}

fn hash_file(path: &Path) -> Result<(u64, [u8; 32]), String> {
    let mut file = File::open(path).map_err(|why| why.to_string())?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let mut length = 0;
    loop {
        let count = file.read(&mut buffer).map_err(|why| why.to_string())?;
        if count == 0 {
            return Ok((length, *hasher.finalize().as_bytes()));
        }
        hasher.update(&buffer[..count]);
        length += count as u64;
    }
}

/// What a shard's header says, once it is known to be the one that `data.json` names.
struct ShardHeader {
    width: u64,
    tokens: u64,
    payload: u64,
    table: [u8; 32],
}

impl ShardHeader {
    fn decode(header: &[u8; HEADER_BYTES], shard: &Shard, vocabulary: u64) -> Result<Self, String> {
        let digest = blake3::hash(&header[..96]);
        if &header[..8] != MAGIC || header[96..] != *digest.as_bytes() || shard.header != *digest.as_bytes() {
            return Err("its header is not the one that data.json names".into());
        }
        let number = |at: usize, bytes: usize| little_endian(&header[at..at + bytes]);
        let (version, width, tokens, payload) = (number(8, 4), number(12, 2), number(16, 8), number(24, 8));
        let chunks = payload.div_ceil(CHUNK_BYTES);
        let file_bytes = payload.checked_add(HEADER_BYTES as u64 + chunks * 32);
        let right = version == 1
            && (width == 2 || width == 4)
            && tokens.checked_mul(width) == Some(payload)
            && number(32, 4) == CHUNK_BYTES
            && number(36, 4) == chunks
            && number(40, 4) == vocabulary
            && number(14, 2) == 0
            && header[44..64].iter().all(|byte| *byte == 0)
            && file_bytes == Some(shard.bytes);
        if !right {
            return Err("its header holds sizes that do not fit each other or data.json".into());
        }
        let mut table = [0; 32];
        table.copy_from_slice(&header[64..96]);
        Ok(Self {
            width,
            tokens,
            payload,
            table,
        })
    }
}

/// Checks a shard from its first byte to its last; returns its tokens.
fn check_shard(path: &Path, shard: &Shard, vocabulary: u64) -> Result<u64, String> {
    let mut reader = File::open(path).map_err(|why| why.to_string())?;
    let mut header = [0; HEADER_BYTES];
    let cut = |what: &str, why: std::io::Error| format!("its {what}: {why}");
    reader.read_exact(&mut header).map_err(|why| cut("header", why))?;
    let header = ShardHeader::decode(&header, shard, vocabulary)?;
    let mut hashes = Vec::new();
    let mut rest = header.payload;
    while rest > 0 {
        let mut chunk = vec![0; rest.min(CHUNK_BYTES) as usize];
        reader.read_exact(&mut chunk).map_err(|why| cut("tokens", why))?;
        rest -= chunk.len() as u64;
        hashes.extend_from_slice(blake3::hash(&chunk).as_bytes());
        let mut tokens = chunk.chunks_exact(header.width as usize).map(little_endian);
        if let Some(token) = tokens.find(|token| *token >= vocabulary) {
            return Err(format!("it holds token {token}, beyond the vocabulary"));
        }
    }
    let mut stored = vec![0; hashes.len()];
    reader.read_exact(&mut stored).map_err(|why| cut("chunk table", why))?;
    if *blake3::hash(&stored).as_bytes() != header.table {
        return Err("its chunk table does not have the hash of its header".into());
    }
    let mut both = stored.chunks_exact(32).zip(hashes.chunks_exact(32));
    if let Some(chunk) = both.position(|(a, b)| a != b) {
        return Err(format!(
            "chunk {chunk} of its tokens does not have the hash of the table"
        ));
    }
    match reader.read(&mut [0]) {
        Ok(0) => Ok(header.tokens),
        Ok(_) => Err("something stands behind its chunk table".into()),
        Err(why) => Err(why.to_string()),
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shard of the tokens 0..count of two bytes each, made by hand.
    fn handmade(count: u16, vocabulary: u32) -> Vec<u8> {
        let payload: Vec<u8> = (0..count).flat_map(u16::to_le_bytes).collect();
        let table: Vec<u8> = payload
            .chunks(CHUNK_BYTES as usize)
            .flat_map(|chunk| *blake3::hash(chunk).as_bytes())
            .collect();
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8] = 1;
        header[12] = 2;
        header[16..24].copy_from_slice(&u64::from(count).to_le_bytes());
        header[24..32].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        header[32..36].copy_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
        header[36..40].copy_from_slice(&((table.len() / 32) as u32).to_le_bytes());
        header[40..44].copy_from_slice(&vocabulary.to_le_bytes());
        header[64..96].copy_from_slice(blake3::hash(&table).as_bytes());
        let digest = blake3::hash(&header[..96]);
        header[96..].copy_from_slice(digest.as_bytes());
        [header.to_vec(), payload, table].concat()
    }

    fn check(bytes: &[u8], original: &[u8]) -> Result<u64, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard");
        std::fs::write(&path, bytes).unwrap();
        let mut header = [0; 32];
        header.copy_from_slice(&original[96..128]);
        let shard = Shard {
            name: "shard".into(),
            bytes: original.len() as u64,
            header,
            split: 0,
        };
        check_shard(&path, &shard, 1_000)
    }

    #[test]
    fn every_flipped_byte_of_a_token_shard_is_noticed() {
        let shard = handmade(100, 1_000);
        assert_eq!(check(&shard, &shard), Ok(100));
        for at in 0..shard.len() {
            let mut damaged = shard.clone();
            damaged[at] ^= 1;
            assert!(check(&damaged, &shard).is_err(), "byte {at}");
        }
        assert!(check(&shard[..shard.len() - 1], &shard).is_err());
        assert!(
            check(&[&shard[..], &[0]].concat(), &shard)
                .unwrap_err()
                .contains("stands behind")
        );
        let foreign = handmade(1_001, 1_000);
        assert!(check(&foreign, &foreign).unwrap_err().contains("token 1000"));
    }

    fn data_json(version: &str) -> String {
        let digest = "00".repeat(32);
        format!(
            "{{\n \"schema\": 1, \"version\": \"{version}\", \"tokenizer\": {{\"file\": {{\"name\": \"t\", \"bytes\": 1, \"blake3\": \"{digest}\"}}, \"vocabulary\": 9}},\n \"domains\": [{{\"name\": \"web\", \"documents\": {{\"name\": \"d\", \"bytes\": 1, \"blake3\": \"{digest}\"}}, \"train\": {{\"tokens\": 101, \"shards\": []}}, \"held_out\": {{\"tokens\": 0, \"shards\": []}}}}]}}"
        )
    }

    #[test]
    fn the_version_is_the_hash_of_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(folder.path().join(DATA_FILE), text).unwrap();
        let shortest = Json::parse(data_json("").as_bytes()).unwrap().print();
        let right = data_json(&blake3::hash(shortest.as_bytes()).to_hex());
        write(&right);
        let set = DataSet::load(folder.path(), 10).unwrap();
        assert_eq!(
            (set.domains[0].train_sequences, set.domains[0].held_out_sequences),
            (10, 0)
        );
        let mut findings = Findings::default();
        set.check_files(&mut findings);
        let said = findings.to_string();
        assert!(
            said.contains("BAD t: ") && said.contains("web, train: 101 tokens, its shards hold 0"),
            "{said}"
        );
        // Of newer data sets' domains, whose own versions are no part of it.
        write(&right.replace("\"name\": \"web\"", "\"name\": \"web\", \"version\": \"00\""));
        assert!(DataSet::load(folder.path(), 10).is_ok());
        write(&right.replace("101", "102"));
        assert!(DataSet::load(folder.path(), 10).unwrap_err().contains("not the hash"));
        write(&right.replace("\"name\": \"d\"", "\"name\": \"../d\""));
        assert!(DataSet::load(folder.path(), 10).is_err());
    }
}
