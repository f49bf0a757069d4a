//! A small file system of its own, with as much room left as a test wants.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Unmounted when dropped.
pub(crate) struct Disk {
    point: PathBuf,
}

impl Disk {
    /// Mounts one at `point`, which is made.
    pub(crate) fn mount(point: &Path, mib: u32) -> Disk {
        std::fs::create_dir(point).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=700"), "samara-test"])
            .arg(point)
            .status();
        assert!(mounted.unwrap().success());
        Disk { point: point.to_owned() }
    }

    fn ballast(&self) -> PathBuf {
        self.point.join("ballast")
    }

    /// Fills it up to this.
    pub(crate) fn leave(&self, kib: u64) {
        self.clear();
        let mut ballast = std::fs::File::create(self.ballast()).unwrap();
        let room = rustix::fs::statvfs(&self.point).unwrap();
        let bytes = (room.f_bavail * room.f_frsize).saturating_sub(kib << 10);
        ballast.write_all(&vec![0; usize::try_from(bytes).unwrap()]).unwrap();
    }

    /// Makes room again.
    pub(crate) fn clear(&self) {
        let _ = std::fs::remove_file(self.ballast());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.point).status();
    }
}
