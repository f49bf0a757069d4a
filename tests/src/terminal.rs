//! The other side of a container's terminal, as engines hold it: a console socket, and the master that comes through it.

use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, accept_with, recvmsg,
};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::until;

/// A console socket that nobody has connected to yet.
#[derive(Debug)]
pub struct Waiting {
    listener: UnixListener,
}

/// The master of a container's terminal. What the container writes is collected.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    collected: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Terminal {
    /// Makes the socket.
    ///
    /// # Errors
    /// When the path is taken or too long for a socket.
    pub fn listen(socket: &Path) -> Result<Waiting> {
        let listener = UnixListener::bind(socket).context("making a console socket")?;
        listener.set_nonblocking(true)?;
        Ok(Waiting { listener })
    }

    /// All that the container has written so far.
    pub fn output(&self) -> String {
        let collected = self.collected.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&collected).into_owned()
    }

    /// Waits until the container has closed the terminal, and all that it has written is collected.
    ///
    /// # Errors
    /// When it is still open after ten seconds.
    pub fn wait_closed(&self) -> Result<()> {
        let closed = || Ok(self.reader.is_finished().then_some(()));
        until("end of the terminal", Duration::from_secs(10), closed)
    }

    /// Types.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn write(&self, text: &str) -> io::Result<()> {
        (&self.master).write_all(text.as_bytes())
    }

    /// Resizes the terminal, as an engine does.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.master, size)?)
    }
}

impl Waiting {
    /// Takes the master from the runtime, which has returned already.
    ///
    /// # Errors
    /// When none comes within ten seconds.
    pub fn accept(self) -> Result<Terminal> {
        let connection = until("console", Duration::from_secs(10), || {
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(connection) => Ok(Some(connection)),
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        let master = File::from(receive(&connection)?);
        let collected: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (mut reader, into) = (master.try_clone()?, Arc::clone(&collected));
        // Ends with the terminal: a read fails when the last slave is closed.
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let mut collected = into.lock().unwrap_or_else(PoisonError::into_inner);
                collected.extend_from_slice(buffer.get(..count).unwrap_or_default());
            }
        });
        Ok(Terminal { master, collected, reader })
    }
}

fn receive(connection: &OwnedFd) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 256];
    recvmsg(
        connection,
        &mut [IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .context("the console socket brought no descriptor")
}
