//! Text in, tokens out: ingestion, tokenizer, token shards, and reading them back (floor 2).
//!
//! [`prepare`] turns the domains of a config into a **data set**: a folder named after its inputs that holds
//! `tokenizer.json`, token shards per domain and split, an index from tokens back to documents (DATA-3), and `data.json`,
//! the [`DataManifest`]. The folder appears by one rename when all of it is on disk, so what is half written is never
//! taken for whole. [`TokenStore`] reads sequences from it, each decoded from a buffer whose hash was
//! right.
//!
//! Invariants
//! - **DET-1** A data set is a function of the sources' bytes and their names below each domain's path, of the domain list
//!   (name, language, text field; format as resolved), the tokenizer settings and the held-out fraction alone: not of
//!   where the domains lie, of thread count, clock or seed. So every run over the same text sees the same split.
//! - **DATA-3** Every token traces back to its document ([`TokenStore::document_at`]); every document left out is listed
//!   with its reason.
//! - No text stands in both splits: the split follows the hash of a document's text.
//!
//! What it does not do: it decides no sample order and no mixture (`tarazed-protocol` does), it filters no quality and
//! removes no near-duplicates beyond exact copies within a domain, and it reads nothing over a network.

mod baseline;
mod chunks;
mod documents;
mod entropy;
mod error;
mod files;
mod manifest;
mod parquet_source;
mod prepare;
mod shard;
mod source;
mod split;
mod store;
mod texts;
mod tokenizer;

pub use baseline::UnigramLoss;
pub use documents::{DocumentRecord, KeptTokens};
pub use error::CorpusError;
pub use manifest::{
    DataManifest, DomainManifest, Dropped, FileManifest, LanguageManifest, MANIFEST_FILE, SourceManifest,
    SplitManifest, TokenizerManifest,
};
pub use prepare::{PrepareEvent, PrepareRequest, Prepared, prepare, prepare_again};
#[doc(hidden)]
pub use shard::fuzzing;
pub use split::Split;
pub use store::{ScoredText, TokenStore};
pub use texts::{SourceText, each_text};
pub use tokenizer::{TOKENIZER_FILE, Tokenizer};
