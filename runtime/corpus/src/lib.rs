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
//! With [`prepare_refined`], text goes through `refine` (what happens to one document: pure functions) and `pipeline` (all
//! documents: pieces, copies, report) before it becomes tokens. Without, exact copies within a domain are all that is left
//! out.
//!
//! What it does not do: it decides no sample order and no mixture (`tarazed-protocol` does), it changes no text but by the rules
//! of `refine`, and it reads nothing over a network.

mod adopt;
mod baseline;
mod chunks;
mod documents;
mod entropy;
mod error;
mod files;
mod input;
mod manifest;
mod parquet_source;
mod pipeline;
mod prepare;
mod refine;
mod refined_text;
mod scan;
mod shard;
mod source;
mod split;
mod store;
mod texts;
mod tokenizer;
mod tokens;

pub use adopt::{adopt, adopt_later, find_data_set, is_same_tokenizer, later_folder};
pub use baseline::UnigramLoss;
pub use documents::{DocumentPlace, DocumentRecord, DroppedRecord, KeptTokens, NamedItem, NamedPlace, RefinedRecord};
pub use error::CorpusError;
pub use manifest::{
    DataManifest, DomainManifest, FileManifest, LanguageManifest, MANIFEST_FILE, RefinementManifest, SourceManifest,
    SplitManifest, TokenizerManifest,
};
pub use prepare::{PrepareEvent, PrepareRequest, Prepared, Stage, prepare, prepare_again, prepare_refined};
pub use refine::{Dropped, ReasonKind, is_han};
pub use refined_text::refine_text;
pub use scan::{Contamination, Found, Searched, decontaminate, train_tokenizer};
#[doc(hidden)]
pub use shard::fuzzing;
pub use split::Split;
pub use store::{ScoredText, TokenStore};
pub use texts::{SourceText, each_text};
pub use tokenizer::{TOKENIZER_FILE, Tokenizer};
pub use tokens::MegatronWriter;
