//! S3's operations in terms of [`Folder`]. What is not here, the crate `s3s` answers with `NotImplemented`.

use crate::folder::{Conditions, Folder, Version, check};
use bytes::BytesMut;
use s3s::dto::*;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;
use tokio::io::AsyncReadExt;

/// Keys of one page of a listing at most, as S3 has it.
const PAGE_KEYS_MAX: usize = 1000;
/// Parts of an upload at most, as S3 has it.
const PARTS_MAX: i32 = 10_000;
/// Bytes read at once for an answer.
const CHUNK_BYTES: u64 = 256 * 1024;

/// The objects of a folder.
#[derive(Clone)]
pub(crate) struct Objects(pub(crate) Arc<Folder>);

impl Objects {
    /// Runs what copies whole objects beside the threads that serve.
    async fn apart<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> S3Result<T> + Send + 'static,
    ) -> S3Result<T> {
        let folder = self.0.clone();
        let done = tokio::task::spawn_blocking(move || work(&folder)).await;
        done.map_err(s3s::S3Error::internal_error)?
    }
}

/// The part of an object's file that an answer carries.
fn stream(file: File, bytes: u64) -> StreamingBlob {
    let file = tokio::fs::File::from_std(file);
    let chunks = futures::stream::try_unfold((file, bytes), |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let wanted = left.min(CHUNK_BYTES);
        let mut chunk = BytesMut::with_capacity(wanted as usize);
        let read = (&mut file).take(wanted).read_buf(&mut chunk).await?;
        if read == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        Ok(Some((chunk.freeze(), (file, left - read as u64))))
    });
    StreamingBlob::wrap(chunks)
}

fn length(version: &Version) -> S3Result<i64> {
    i64::try_from(version.bytes).map_err(s3s::S3Error::internal_error)
}

/// One line of a listing: an object, or what keys have in common up to the delimiter.
enum Line {
    Object(Version),
    Prefix,
}

/// Objects of a listing, with those behind a delimiter taken together.
fn lines(objects: Vec<(String, Version)>, prefix: &str, delimiter: Option<&str>) -> BTreeMap<String, Line> {
    let delimiter = delimiter.filter(|delimiter| !delimiter.is_empty());
    let line = |(key, version): (String, Version)| {
        let common = delimiter.and_then(|delimiter| {
            let at = key[prefix.len()..].find(delimiter)?;
            Some(key[..prefix.len() + at + delimiter.len()].to_owned())
        });
        match common {
            Some(common) => (common, Line::Prefix),
            None => (key, Line::Object(version)),
        }
    };
    objects.into_iter().map(line).collect()
}

#[async_trait::async_trait]
impl S3 for Objects {
    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        if self.0.bucket(&req.input.bucket).is_ok() {
            return Err(s3_error!(BucketAlreadyOwnedByYou));
        }
        let made = self.0.create_bucket(&req.input.bucket);
        made.map_err(s3s::S3Error::internal_error)?;
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.0.bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.0.bucket(&req.input.bucket)?;
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn list_buckets(&self, _: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        let buckets = self.0.buckets()?.into_iter().map(|(name, modified)| Bucket {
            name: Some(name),
            creation_date: Some(modified.into()),
            ..Default::default()
        });
        Ok(S3Response::new(ListBucketsOutput {
            buckets: Some(buckets.collect()),
            ..Default::default()
        }))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        // Said before the body is taken in; what counts is said again when it is placed.
        self.0.bucket(&input.bucket)?;
        let body = input.body.ok_or_else(|| s3_error!(IncompleteBody))?;
        let conditions = Conditions {
            if_match: input.if_match,
            if_none_match: input.if_none_match,
        };
        let body = self.0.receive(body).await?;
        let version = self.0.place(&body, &input.bucket, &input.key, &conditions)?;
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(version.etag()),
            ..Default::default()
        }))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let (mut file, version) = self.0.open_object(&input.bucket, &input.key)?;
        let if_match = Conditions {
            if_match: input.if_match,
            if_none_match: None,
        };
        check(Some(version), &if_match)?;
        let if_none_match = Conditions {
            if_match: None,
            if_none_match: input.if_none_match,
        };
        check(Some(version), &if_none_match).map_err(|_| s3_error!(NotModified))?;
        let range = match input.range {
            Some(range) => Some(range.check(version.bytes)?),
            None => None,
        };
        let (start, end) = range
            .as_ref()
            .map_or((0, version.bytes), |range| (range.start, range.end));
        file.seek(SeekFrom::Start(start))
            .map_err(s3s::S3Error::internal_error)?;
        let bytes = end.saturating_sub(start);
        Ok(S3Response::new(GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            body: Some(stream(file, bytes)),
            content_length: Some(i64::try_from(bytes).map_err(s3s::S3Error::internal_error)?),
            content_range: range.map(|range| {
                let last = range.end.saturating_sub(1);
                format!("bytes {}-{last}/{}", range.start, version.bytes)
            }),
            e_tag: Some(version.etag()),
            last_modified: Some(version.modified.into()),
            ..Default::default()
        }))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let (_, version) = self.0.open_object(&req.input.bucket, &req.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(length(&version)?),
            e_tag: Some(version.etag()),
            last_modified: Some(version.modified.into()),
            ..Default::default()
        }))
    }

    async fn copy_object(&self, req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        let input = req.input;
        let conditional = input.copy_source_if_match.is_some()
            || input.copy_source_if_none_match.is_some()
            || input.copy_source_if_modified_since.is_some()
            || input.copy_source_if_unmodified_since.is_some();
        let CopySource::Bucket { bucket, key, .. } = input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        if conditional {
            return Err(s3_error!(NotImplemented, "copies have no conditions here"));
        }
        let copied = self.apart(move |folder| {
            let (source, _) = folder.open_object(&bucket, &key)?;
            let copy = folder.duplicate(source)?;
            folder.place(&copy, &input.bucket, &input.key, &Conditions::default())
        });
        let version = copied.await?;
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(CopyObjectResult {
                e_tag: Some(version.etag()),
                last_modified: Some(version.modified.into()),
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.0.remove(&req.input.bucket, &req.input.key)?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let input = req.input;
        let quiet = input.delete.quiet.unwrap_or_default();
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for object in input.delete.objects {
            match self.0.remove(&input.bucket, &object.key) {
                Ok(()) => deleted.push(DeletedObject {
                    key: Some(object.key),
                    ..Default::default()
                }),
                Err(error) => errors.push(Error {
                    key: Some(object.key),
                    code: Some(error.code().as_str().to_owned()),
                    message: error.message().map(str::to_owned),
                    ..Default::default()
                }),
            }
        }
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: (!quiet).then_some(deleted),
            errors: (!errors.is_empty()).then_some(errors),
            ..Default::default()
        }))
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let objects = self.0.list(&input.bucket, &prefix)?;
        let lines = lines(objects, &prefix, input.delimiter.as_deref());
        let page_max = input
            .max_keys
            .map_or(PAGE_KEYS_MAX, |keys| usize::try_from(keys).unwrap_or(0));
        let page_max = page_max.min(PAGE_KEYS_MAX);
        // A page begins behind the last line of the one before; its name is the token.
        let after = input.continuation_token.as_ref().max(input.start_after.as_ref());
        let mut rest = lines
            .into_iter()
            .filter(|(name, _)| after.is_none_or(|after| name > after));
        let (mut contents, mut prefixes, mut last) = (Vec::new(), Vec::new(), None);
        for (name, line) in rest.by_ref().take(page_max) {
            last = Some(name.clone());
            match line {
                Line::Prefix => prefixes.push(CommonPrefix { prefix: Some(name) }),
                Line::Object(version) => contents.push(Object {
                    key: Some(name),
                    size: Some(length(&version)?),
                    e_tag: Some(version.etag()),
                    last_modified: Some(version.modified.into()),
                    ..Default::default()
                }),
            }
        }
        let more = page_max > 0 && rest.next().is_some();
        Ok(S3Response::new(ListObjectsV2Output {
            key_count: i32::try_from(contents.len() + prefixes.len()).ok(),
            max_keys: i32::try_from(page_max).ok(),
            is_truncated: Some(more),
            next_continuation_token: last.filter(|_| more),
            contents: Some(contents),
            common_prefixes: Some(prefixes),
            name: Some(input.bucket),
            prefix: input.prefix,
            delimiter: input.delimiter,
            continuation_token: input.continuation_token,
            start_after: input.start_after,
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let id = self.0.begin_upload(&req.input.bucket, &req.input.key)?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(req.input.bucket),
            key: Some(req.input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let input = req.input;
        if !(1..=PARTS_MAX).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "parts have numbers from 1 to {PARTS_MAX}"));
        }
        let body = input.body.ok_or_else(|| s3_error!(IncompleteBody))?;
        let body = self.0.receive(body).await?;
        let (id, bucket, key) = (&input.upload_id, &input.bucket, &input.key);
        let version = self.0.place_part(&body, id, bucket, key, input.part_number)?;
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(version.etag()),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        let named = input
            .multipart_upload
            .and_then(|upload| upload.parts)
            .unwrap_or_default();
        let parts = named.into_iter().map(|part| Some((part.part_number?, part.e_tag)));
        let parts: Option<Vec<_>> = parts.collect();
        let parts = parts.ok_or_else(|| s3_error!(InvalidPart))?;
        let conditions = Conditions {
            if_match: input.if_match,
            if_none_match: input.if_none_match,
        };
        let (id, bucket, key) = (input.upload_id, input.bucket.clone(), input.key.clone());
        let placed = self.apart(move |folder| {
            let whole = folder.join(&id, &bucket, &key, &parts)?;
            let version = folder.place(&whole, &bucket, &key, &conditions)?;
            folder.end_upload(&id, &bucket, &key)?;
            Ok(version)
        });
        let version = placed.await?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(version.etag()),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = req.input;
        self.0.end_upload(&input.upload_id, &input.bucket, &input.key)?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }
}
