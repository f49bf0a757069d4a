//! Addresses of capsules: `file:///dir`, `s3://bucket/path`, `gs://bucket/path`, `az://container/path`.
//!
//! An address is checked when it is parsed. Its path has no empty, `.` or `..` segment, so that comparing text is
//! comparing places, and an address under an allowed prefix can't leave it.

use std::fmt;
use std::path::Path;

/// An address takes at most this many bytes: the limit of S3 for a key, less what we append.
pub const LOCATION_BYTES_MAX: usize = 900;

/// The kind of store that an address names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    File,
    S3,
    Gs,
    Az,
}

impl Scheme {
    /// As written in an address, before `://`.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::File => "file",
            Scheme::S3 => "s3",
            Scheme::Gs => "gs",
            Scheme::Az => "az",
        }
    }
}

/// A place in a store: the address of a capsule, or a prefix of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    scheme: Scheme,
    bucket: String,
    segments: Vec<String>,
}

/// The text is no address.
#[derive(Debug, thiserror::Error)]
pub enum LocationError {
    #[error("{text:?} is no capsule address; use file:///dir, s3://bucket/path, gs://bucket/path or az://container/path")]
    Scheme { text: String },
    #[error("{text:?} names no bucket; write {scheme}://bucket/path")]
    Bucket { text: String, scheme: &'static str },
    #[error("{text:?} is no absolute path; write file:///dir")]
    Relative { text: String },
    #[error("{text:?} is longer than {LOCATION_BYTES_MAX} bytes")]
    Long { text: String },
    #[error("{text:?} has an empty, '.' or '..' part, or a character that is not allowed (only printable ASCII without space and any of \\ % ? # * \" < > |)")]
    Segment { text: String },
    #[error("the folder {text:?} has no absolute path that is valid text")]
    Folder { text: String },
}

impl Location {
    /// Parses an address or a prefix. One slash at the end is ignored.
    pub fn parse(text: &str) -> Result<Location, LocationError> {
        let quoted = || text.chars().take(200).collect::<String>();
        if text.len() > LOCATION_BYTES_MAX {
            return Err(LocationError::Long { text: quoted() });
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| LocationError::Scheme { text: quoted() })?;
        let scheme = match scheme {
            "file" => Scheme::File,
            "s3" => Scheme::S3,
            "gs" => Scheme::Gs,
            "az" => Scheme::Az,
            _ => return Err(LocationError::Scheme { text: quoted() }),
        };
        let (bucket, path) = match scheme {
            Scheme::File => {
                let path = rest.strip_prefix('/').ok_or_else(|| LocationError::Relative { text: quoted() })?;
                ("", path)
            }
            Scheme::S3 | Scheme::Gs | Scheme::Az => rest.split_once('/').unwrap_or((rest, "")),
        };
        let in_bucket = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
        if scheme != Scheme::File && (bucket.is_empty() || !bucket.chars().all(in_bucket)) {
            return Err(LocationError::Bucket { text: quoted(), scheme: scheme.name() });
        }
        let path = path.strip_suffix('/').unwrap_or(path);
        let segments: Vec<String> = match path {
            "" => Vec::new(),
            path => path.split('/').map(str::to_owned).collect(),
        };
        let allowed = |c: char| c.is_ascii_graphic() && !r#"\%?#*"<>|"#.contains(c);
        let fine = |segment: &String| {
            !matches!(segment.as_str(), "" | "." | "..") && segment.chars().all(allowed)
        };
        match segments.iter().all(fine) {
            true => Ok(Location { scheme, bucket: bucket.to_owned(), segments }),
            false => Err(LocationError::Segment { text: quoted() }),
        }
    }

    /// The address of a plain folder, for `--image-path`. A relative path counts from the working directory.
    ///
    /// The folder's name may have any characters, unlike that of a `file://` address.
    pub fn folder(path: &Path) -> Result<Location, LocationError> {
        let error = || LocationError::Folder { text: path.display().to_string() };
        let absolute = std::path::absolute(path).map_err(|_| error())?;
        let mut segments = Vec::new();
        for component in absolute.components() {
            match component {
                std::path::Component::RootDir | std::path::Component::CurDir => {}
                std::path::Component::Normal(name) => segments.push(name.to_str().ok_or_else(error)?.to_owned()),
                // The folder that `..` leads to depends on symbolic links before it.
                std::path::Component::ParentDir => return Err(error()),
                std::path::Component::Prefix(_) => return Err(error()),
            }
        }
        Ok(Location { scheme: Scheme::File, bucket: String::new(), segments })
    }

    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The bucket or container; empty for a folder.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// The path without slashes at its ends; for a folder, without its leading slash.
    pub fn path(&self) -> String {
        self.segments.join("/")
    }

    /// The folder that a `file://` address names.
    pub fn as_folder(&self) -> Option<std::path::PathBuf> {
        (self.scheme == Scheme::File).then(|| Path::new("/").join(self.path()))
    }

    /// Whether this place is `prefix` or lies under it.
    pub fn is_under(&self, prefix: &Location) -> bool {
        self.scheme == prefix.scheme && self.bucket == prefix.bucket && self.segments.starts_with(&prefix.segments)
    }

    /// The number of parts of the path, by which one of two prefixes of the same place is the longer one.
    pub fn depth(&self) -> usize {
        self.segments.len()
    }

    /// A place under this one, by parts of a path that a store listed.
    pub(crate) fn join(&self, parts: impl Iterator<Item = String>) -> Location {
        let mut location = self.clone();
        location.segments.extend(parts);
        location
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.name(), self.bucket)?;
        match self.segments.as_slice() {
            [] if self.scheme == Scheme::File => f.write_str("/"),
            segments => segments.iter().try_for_each(|segment| write!(f, "/{segment}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_as_text() {
        for text in ["file:///a/b", "file:///", "s3://bucket", "s3://bucket/jobs/42", "gs://b/x", "az://c/x_y=1"] {
            assert_eq!(Location::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Location::parse("s3://bucket/jobs/").unwrap().to_string(), "s3://bucket/jobs");
        assert_eq!(Location::folder(Path::new("/x y/é")).unwrap().as_folder().unwrap(), Path::new("/x y/é"));
    }

    #[test]
    fn what_could_mean_another_place_is_refused() {
        for text in [
            "", "jobs", "http://x/y", "s3:/b/x", "s3://", "s3:///x", "s3://user:pw@host/x", "file://a/b", "file://", "s3://b//x",
            "s3://b/../x", "s3://b/./x", "s3://b/a%2e%2e/x", "s3://b/x?y", "s3://b/x#y", "s3://b/x y", "s3://b/\u{e9}", "s3://b/x//",
        ] {
            assert!(Location::parse(text).is_err(), "{text}");
        }
        assert!(Location::parse(&format!("s3://b/{}", "a".repeat(1000))).is_err());
        assert!(Location::folder(Path::new("/a/../b")).is_err());
    }

    #[test]
    fn prefixes_end_at_parts() {
        let under = |place: &str, prefix: &str| {
            Location::parse(place).unwrap().is_under(&Location::parse(prefix).unwrap())
        };
        assert!(under("s3://b/jobs/42", "s3://b/jobs"));
        assert!(under("s3://b/jobs", "s3://b/jobs/"));
        assert!(under("s3://b/jobs", "s3://b"));
        assert!(!under("s3://b/jobs2", "s3://b/jobs"));
        assert!(!under("s3://bb/jobs", "s3://b"));
        assert!(!under("gs://b/jobs", "s3://b"));
    }
}
