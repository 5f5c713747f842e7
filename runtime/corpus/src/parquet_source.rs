//! String columns of parquet files, a batch of rows at a time.

use crate::error::CorpusError;
use crate::source::{DOCUMENT_BYTES_MAX, Document};
use parquet::basic::Type;
use parquet::column::reader::get_typed_column_reader;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use std::fs::File;
use std::path::Path;

/// Rows decoded at once.
const ROWS: usize = 256;

/// Hands the text of every row to `sink`. A nested column is named by its path, e.g. `page.text`; a null gives an empty
/// document, so that it is counted.
///
/// # Errors
/// [`CorpusError::BadParquet`], [`CorpusError::MissingColumn`], [`CorpusError::InvalidUtf8`], or the sink's own.
pub(crate) fn documents(
    path: &Path,
    column: &str,
    sink: &mut dyn FnMut(Document) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    values(path, column, &mut |record, bytes| {
        let text = text(path, bytes, record)?;
        sink(Document { text, record })?;
        Ok(true)
    })
}

/// Takes a row's number and bytes; false for no more.
type Sink<'a> = dyn FnMut(u64, &[u8]) -> Result<bool, CorpusError> + 'a;

/// Hands the bytes of every row to `sink`, with the row's number from 1, until that says false; a null gives none.
///
/// # Errors
/// [`CorpusError::BadParquet`], [`CorpusError::MissingColumn`], or the sink's own.
pub(crate) fn values(path: &Path, column: &str, sink: &mut Sink<'_>) -> Result<(), CorpusError> {
    let bad = |e: parquet::errors::ParquetError| CorpusError::BadParquet {
        path: path.to_owned(),
        reason: e.to_string(),
    };
    let file = File::open(path).map_err(CorpusError::unreadable(path))?;
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let found = schema
        .columns()
        .iter()
        .position(|c| c.path().string() == column && c.physical_type() == Type::BYTE_ARRAY && c.max_rep_level() == 0);
    let Some(index) = found else {
        let columns: Vec<_> = schema.columns().iter().map(|c| c.path().string()).collect();
        return Err(CorpusError::MissingColumn {
            path: path.to_owned(),
            column: column.to_owned(),
            columns: columns.join(", "),
        });
    };
    let whole = schema.column(index).max_def_level();
    let mut record = 0_u64;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(bad)?;
        let mut cells = get_typed_column_reader::<ByteArrayType>(group.get_column_reader(index).map_err(bad)?);
        let (mut levels, mut values): (Vec<i16>, Vec<ByteArray>) = (Vec::new(), Vec::new());
        loop {
            levels.clear();
            values.clear();
            let (rows, _, _) = cells
                .read_records(ROWS, Some(&mut levels), None, &mut values)
                .map_err(bad)?;
            if rows == 0 {
                break;
            }
            let mut present = values.iter();
            for row in 0..rows {
                record += 1;
                // A required column has no definition levels: every value is there.
                let value = if whole == 0 || levels.get(row) == Some(&whole) {
                    present.next()
                } else {
                    None
                };
                if !sink(record, value.map_or(&[], |v| v.data()))? {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

fn text(path: &Path, bytes: &[u8], record: u64) -> Result<String, CorpusError> {
    if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
        return Err(CorpusError::DocumentTooLarge {
            path: path.to_owned(),
            place: format!("row {record}"),
            limit_bytes: DOCUMENT_BYTES_MAX,
        });
    }
    let text = std::str::from_utf8(bytes).map_err(|e| CorpusError::InvalidUtf8 {
        path: path.to_owned(),
        offset: format!("{} of row {record}", e.valid_up_to()),
    })?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::sync::Arc;

    fn write(path: &Path, compression: Compression, rows: &[Option<&[u8]>]) {
        let schema = "message m { required int64 id; optional binary text (UTF8); repeated binary tags (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        for part in rows.chunks(700) {
            let mut group = writer.next_row_group().unwrap();
            let ids: Vec<i64> = (0..part.len() as i64).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column
                .typed::<parquet::data_type::Int64Type>()
                .write_batch(&ids, None, None)
                .unwrap();
            column.close().unwrap();
            let values: Vec<ByteArray> = part.iter().flatten().map(|v| ByteArray::from(v.to_vec())).collect();
            let levels: Vec<i16> = part.iter().map(|v| i16::from(v.is_some())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column
                .typed::<ByteArrayType>()
                .write_batch(&values, Some(&levels), None)
                .unwrap();
            column.close().unwrap();
            let none = vec![0_i16; part.len()];
            let mut column = group.next_column().unwrap().unwrap();
            column
                .typed::<ByteArrayType>()
                .write_batch(&[], Some(&none), Some(&none))
                .unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn read(path: &Path, column: &str) -> Result<Vec<String>, CorpusError> {
        let mut texts = Vec::new();
        documents(path, column, &mut |d| {
            assert_eq!(d.record, texts.len() as u64 + 1);
            texts.push(d.text);
            Ok(())
        })?;
        Ok(texts)
    }

    #[test]
    fn every_row_is_read_in_order_under_every_compression() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let texts: Vec<String> = (0..1500).map(|i| format!("文本 {i} {}", "x".repeat(i % 90))).collect();
        let rows: Vec<Option<&[u8]>> = texts
            .iter()
            .enumerate()
            .map(|(i, t)| (i % 7 != 3).then_some(t.as_bytes()))
            .collect();
        let level = ZstdLevel::try_new(3).unwrap();
        let gzip = Compression::GZIP(parquet::basic::GzipLevel::default());
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(level),
            gzip,
            Compression::LZ4_RAW,
        ] {
            write(&path, compression, &rows);
            let expected: Vec<String> = texts
                .iter()
                .enumerate()
                .map(|(i, t)| if i % 7 == 3 { String::new() } else { t.clone() })
                .collect();
            assert_eq!(read(&path, "text").unwrap(), expected);
        }
    }

    #[test]
    fn bad_files_and_columns_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write(&path, Compression::SNAPPY, &[Some(b"ok"), Some(b"caf\xe9")]);
        let error = read(&path, "text").unwrap_err().to_string();
        assert!(error.contains("a.parquet: invalid UTF-8 at byte 3 of row 2"), "{error}");
        for column in ["body", "id", "tags"] {
            let error = read(&path, column).unwrap_err().to_string();
            assert!(
                error.contains(&format!("no string column '{column}' (its columns: id, text, tags)")),
                "{error}"
            );
        }
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(matches!(read(&path, "text"), Err(CorpusError::BadParquet { .. })));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(read(&path, "text"), Err(CorpusError::BadParquet { .. })));
    }
}
