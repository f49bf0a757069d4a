//! A small S3 over a folder, which fails on order: at one request, or from one on.
//!
//! It knows what a capture and a restore call: writing (also put-if-absent), reading, looking up and listing. An object is a file
//! of its name, so that what is stored can be looked at whatever becomes of the way there. Signatures are not checked.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is answered with this status.
    Refuse(u16),
    /// It is read, and never answered.
    Stall,
    /// It is done, and its answer ends in the middle.
    CutAnswer,
    /// It is read to its middle. Half of a blob stays in the place of the whole.
    CutRequest,
    /// The connection ends without an answer, and so does each later one at once.
    Vanish,
}

/// Which requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    Once,
    FromThenOn,
}

pub(crate) struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    folder: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    order: Option<Order>,
    /// Requests since the order.
    seen: usize,
    /// The first request that failed.
    struck: Option<String>,
    ended: bool,
}

#[derive(Clone, Copy)]
struct Order {
    fault: Fault,
    at: usize,
    reach: Reach,
}

struct Request {
    method: String,
    /// `/bucket/key`
    path: String,
    query: String,
    headers: Vec<(String, String)>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Server {
    /// A store whose buckets are the folders in `folder`.
    pub(crate) fn start(folder: &Path) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            folder: folder.to_owned(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if accepting.lock().ended {
                    break;
                }
                let shared = accepting.clone();
                // A connection that ends early is the client's affair.
                std::thread::spawn(move || shared.serve(client).unwrap_or_default());
            }
        });
        Server { address, shared }
    }

    /// The configuration of a node whose calls end after a second.
    pub(crate) fn configuration(&self) -> String {
        format!(
            "[store]\nallowed_prefixes = [\"s3://capsules/\"]\ntimeout_seconds = 2\n[store.s3]\nendpoint = \"http://{}\"\n\
             allow_http = true\naccess_key_id = \"key\"\nsecret_access_key = \"secret\"\n",
            self.address
        )
    }

    /// From now on, request `at` (from 0) fails, and those after it if it is to reach so far.
    pub(crate) fn fail(&self, fault: Fault, at: usize, reach: Reach) {
        let mut state = self.shared.lock();
        *state = State { order: Some(Order { fault, at, reach }), ..State::default() };
    }

    /// From now on nothing fails. Answers what the first request was that did.
    pub(crate) fn heal(&self) -> Option<String> {
        let mut state = self.shared.lock();
        let struck = state.struck.take();
        *state = State::default();
        drop(state);
        self.shared.changed.notify_all();
        struck
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        // Wakes up who accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The fault of the request that has just arrived.
    fn fault_of(&self, request: &Request) -> Option<Fault> {
        let mut state = self.lock();
        let order = state.order?;
        let number = state.seen;
        state.seen += 1;
        let fails = number == order.at || number > order.at && order.reach == Reach::FromThenOn;
        if !fails {
            return None;
        }
        state.struck.get_or_insert_with(|| format!("{} {}", request.method, request.path));
        Some(order.fault)
    }

    fn is_gone(&self) -> bool {
        let state = self.lock();
        state.ended
            || state.struck.is_some()
                && state.order.is_some_and(|order| {
                    (order.fault, order.reach) == (Fault::Vanish, Reach::FromThenOn)
                })
    }

    fn serve(&self, client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut reader = BufReader::new(client.try_clone()?);
        let mut writer = client;
        while let Some(request) = Request::read(&mut reader)? {
            if self.is_gone() {
                break;
            }
            let bytes: usize = request
                .header("content-length")
                .and_then(|length| length.parse().ok())
                .unwrap_or_default();
            let fault = self.fault_of(&request);
            let wanted = if fault == Some(Fault::CutRequest) { bytes / 2 } else { bytes };
            let mut body = vec![0; wanted];
            reader.read_exact(&mut body)?;
            match fault {
                None => self.answer(&request, &body).send(&request, &mut writer, true)?,
                Some(Fault::Refuse(status)) => {
                    let words = if status == 403 { "AccessDenied" } else { "InternalError" };
                    Answer::error(status, words).send(&request, &mut writer, true)?;
                }
                Some(Fault::Stall) => {
                    let stalls = |state: &mut State| {
                        !state.ended && state.order.is_some_and(|order| order.fault == Fault::Stall)
                    };
                    drop(self.changed.wait_while(self.lock(), stalls).unwrap());
                    break;
                }
                Some(Fault::CutAnswer) => {
                    self.answer(&request, &body).send(&request, &mut writer, false)?;
                    break;
                }
                Some(Fault::CutRequest) => {
                    if request.method == "PUT" && request.header("if-none-match").is_none() {
                        self.answer(&request, &body);
                    }
                    break;
                }
                Some(Fault::Vanish) => break,
            }
        }
        writer.shutdown(Shutdown::Both)
    }

    fn answer(&self, request: &Request, body: &[u8]) -> Answer {
        let file = self.folder.join(request.path.trim_start_matches('/'));
        match request.method.as_str() {
            "PUT" => self.put(&file, body, request.header("if-none-match").is_some()),
            "GET" if request.query.contains("list-type=2") => self.list(request),
            "GET" | "HEAD" => match std::fs::read(&file) {
                Ok(content) => match request.range(content.len()) {
                    Some(range) => Answer::part(&content, range),
                    None => Answer::object(content),
                },
                Err(_) => Answer::error(404, "NoSuchKey"),
            },
            _ => Answer::error(501, "NotImplemented"),
        }
    }

    fn put(&self, file: &Path, body: &[u8], only_new: bool) -> Answer {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        // One at a time: whoever finds nothing there is the one who writes it.
        let _guard = self.lock();
        if only_new && file.exists() {
            return Answer::error(412, "PreconditionFailed");
        }
        std::fs::write(file, body).unwrap();
        Answer { status: 200, headers: vec![("ETag", etag(body))], body: Vec::new() }
    }

    fn list(&self, request: &Request) -> Answer {
        let bucket = self.folder.join(request.path.trim_matches('/'));
        let prefix = request.parameter("prefix").unwrap_or_default();
        let mut keys = Vec::new();
        files_below(&bucket, &mut keys);
        let mut contents = String::new();
        for file in keys {
            let key = file.strip_prefix(&bucket).unwrap().to_str().unwrap().to_owned();
            if key.starts_with(&prefix) {
                let bytes = std::fs::metadata(&file).map_or(0, |metadata| metadata.len());
                contents.push_str(&format!(
                    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                     <ETag>&quot;0&quot;</ETag><Size>{bytes}</Size></Contents>"
                ));
            }
        }
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult>\
             <IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        );
        Answer { status: 200, headers: Vec::new(), body: body.into_bytes() }
    }
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        match path.is_dir() {
            true => files_below(&path, found),
            false => found.push(path),
        }
    }
}

fn etag(content: &[u8]) -> String {
    format!("\"{}\"", samara_capsule::digest::Digest::of(content).hex())
}

impl Request {
    /// The next head of a connection; none at its end.
    fn read(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut request = Request {
            method: method.to_owned(),
            path: decoded(path),
            query: query.to_owned(),
            headers: Vec::new(),
        };
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            request.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Ok(Some(request))
    }

    /// The bytes that are asked for, of an object of so many; none where all are.
    fn range(&self, bytes: usize) -> Option<std::ops::Range<usize>> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        let end = last.parse().map_or(bytes, |last: usize| bytes.min(last + 1));
        Some(first.parse().ok().filter(|first| *first < end)?..end)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn parameter(&self, name: &str) -> Option<String> {
        let pairs = self.query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(known, _)| *known == name).map(|(_, value)| decoded(value))
    }
}

/// Without the escapes of a URL.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let code = after.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).unwrap()
}

impl Answer {
    fn part(content: &[u8], range: std::ops::Range<usize>) -> Answer {
        let place = format!("bytes {}-{}/{}", range.start, range.end - 1, content.len());
        let object = Answer::object(content.to_vec());
        let mut headers = object.headers;
        headers.push(("Content-Range", place));
        Answer { status: 206, headers, body: content[range].to_vec() }
    }

    fn object(content: Vec<u8>) -> Answer {
        let headers = vec![
            ("ETag", etag(&content)),
            ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT".to_owned()),
        ];
        Answer { status: 200, headers, body: content }
    }

    fn error(status: u16, code: &str) -> Answer {
        let body = format!("<Error><Code>{code}</Code><Message>as ordered</Message></Error>");
        Answer { status, headers: Vec::new(), body: body.into_bytes() }
    }

    /// Sends it, whole or up to its middle.
    fn send(self, request: &Request, writer: &mut TcpStream, whole: bool) -> io::Result<()> {
        let mut text =
            format!("HTTP/1.1 {} -\r\nContent-Length: {}\r\n", self.status, self.body.len());
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        let head = bytes.len();
        if request.method != "HEAD" {
            bytes.extend_from_slice(&self.body);
        }
        // Within the body, if there is one: its reader must notice that the rest is missing.
        let (from, to) = if bytes.len() > head { (head, bytes.len()) } else { (0, head) };
        let end = if whole { to } else { from + (to - from) / 2 };
        writer.write_all(bytes.get(..end).unwrap_or_default())
    }
}
