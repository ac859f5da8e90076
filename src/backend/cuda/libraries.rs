//! Finding NVIDIA's libraries: the driver, NVRTC and cuBLAS, by absolute path, before anything binds to them.
//!
//! cudarc panics on a library that is not there. Each is therefore opened here first, by the path where it was found;
//! when cudarc then asks for it by name, the dynamic loader hands out the one that is open already.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use nvml_wrapper::Nvml;

/// Oldest driver that runs what NVRTC 12 compiles: CUDA 12.0, driver 525.60 (`cuDriverGetVersion`'s encoding).
pub const DRIVER_MINIMUM: i32 = 12000;

/// CUDA versions whose libraries are looked for, newest first: the number behind `.so.`.
const MAJORS: [u32; 2] = [13, 12];

/// A library that was opened and stays open.
#[derive(Debug)]
pub struct Found {
    pub path: PathBuf,
    /// CUDA's encoding, 13000 for 13.0; 0 where the library does not tell.
    pub version: i32,
}

/// What was looked for and found. Libraries stay open until the program ends.
#[derive(Debug)]
pub struct Libraries {
    pub driver: Result<Found, String>,
    pub nvrtc: Result<Found, String>,
    pub cublas: Result<Found, String>,
    /// Folders that were searched, for `doctor`.
    pub searched: Vec<PathBuf>,
}

impl Libraries {
    /// Looks once and remembers the answer.
    pub fn get() -> &'static Self {
        static FOUND: OnceLock<Libraries> = OnceLock::new();
        FOUND.get_or_init(Self::search)
    }

    fn search() -> Self {
        let searched = folders();
        let driver = find_driver(&searched);
        let newest = driver.as_ref().map_or(i32::MAX, |driver| driver.version);
        Self { nvrtc: find_nvrtc(&searched, newest), cublas: find_cublas(&searched, newest), driver, searched }
    }

    /// What was found, by name, with its version; the driver also with the release that its installer has.
    pub fn versions(&self) -> Vec<(String, String)> {
        let release = Nvml::init().ok().and_then(|library| library.sys_driver_version().ok());
        let cuda = [("CUDA driver", &self.driver), ("NVRTC", &self.nvrtc)];
        let cuda = cuda.into_iter().filter_map(|(name, found)| Some((name, show(found.as_ref().ok()?.version))));
        release
            .map(|release| ("NVIDIA driver", release))
            .into_iter()
            .chain(cuda)
            .map(|(name, version)| (name.to_owned(), version))
            .collect()
    }
}

/// How to get what is missing, for hints.
pub const HOW_TO_GET: &str = "the driver comes from https://www.nvidia.com/drivers; the compiler and cuBLAS from a CUDA toolkit, or \
    `pip install nvidia-cuda-nvrtc nvidia-cublas` for the python3 that is first in PATH";

/// Folders that may hold the libraries, in the order of preference, without duplicates.
fn folders() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(name) {
            found.extend(["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|lib| Path::new(&home).join(lib)));
        }
    }
    if let Some(paths) = std::env::var_os("LD_LIBRARY_PATH") {
        found.extend(std::env::split_paths(&paths));
    }
    for packages in site_packages() {
        found.extend(children(&packages.join("nvidia"), |_| true).into_iter().map(|package| package.join("lib")));
    }
    let mut toolkits = children(Path::new("/usr/local"), |name| name.starts_with("cuda"));
    toolkits.reverse();
    found.extend(toolkits.iter().flat_map(|home| ["lib64", "targets/x86_64-linux/lib"].map(|lib| home.join(lib))));
    let system = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/lib/wsl/lib",
        "/usr/local/nvidia/lib64",
        "/usr/local/nvidia/lib",
        "/run/opengl-driver/lib",
    ];
    found.extend(system.map(PathBuf::from));
    let mut seen = BTreeSet::new();
    found.retain(|folder| folder.is_dir() && seen.insert(folder.clone()));
    found
}

/// Python's folders of packages: of the active environment, of every python3 in PATH, of the user and of the system.
fn site_packages() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::env::var_os("PYTHONPATH").map(|paths| std::env::split_paths(&paths).collect()).unwrap_or_default();
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    if let Some(paths) = std::env::var_os("PATH") {
        let with_python = std::env::split_paths(&paths).filter(|folder| folder.join("python3").exists());
        prefixes.extend(with_python.filter_map(|folder| folder.parent().map(Path::to_owned)));
    }
    if let Some(home) = std::env::var_os("HOME") {
        prefixes.push(Path::new(&home).join(".local"));
    }
    prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
    for prefix in prefixes {
        for python in children(&prefix.join("lib"), |name| name.starts_with("python3")) {
            found.extend(["site-packages", "dist-packages"].map(|packages| python.join(packages)));
        }
    }
    found
}

/// Folders and files in `folder` whose names are `wanted`, in order.
fn children(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted))
        .collect();
    found.sort();
    found
}

/// Opens a library for good, so that later lookups by its name find it.
fn open(path: &Path) -> Result<Library, String> {
    // SAFETY: NVIDIA's libraries have no initializers that break Rust's rules; they are never closed.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|error| format!("{}: {error}", path.display()))
}

/// Asks an open library for its version by a function `int f(int *version)`.
fn version(library: &Library, function: &str) -> Option<i32> {
    // SAFETY: the named functions of CUDA's driver have this signature.
    unsafe {
        let ask = library.get::<unsafe extern "C" fn(*mut i32) -> i32>(function).ok()?;
        let mut version = 0;
        (ask(&raw mut version) == 0).then_some(version)
    }
}

fn find_driver(folders: &[PathBuf]) -> Result<Found, String> {
    let mut failed = Vec::new();
    // The loader's own search comes last: it knows folders that only its configuration names.
    let named = folders.iter().map(|folder| folder.join("libcuda.so.1")).filter(|path| path.exists());
    for path in named.chain([PathBuf::from("libcuda.so.1")]) {
        match open(&path) {
            Ok(library) => {
                let version = version(&library, "cuDriverGetVersion").unwrap_or(0);
                std::mem::forget(library);
                if version == 0 {
                    failed.push(format!("{} does not tell its version", path.display()));
                    continue;
                }
                return Ok(Found { path, version });
            }
            Err(error) => failed.push(error),
        }
    }
    Err(failed.pop().unwrap_or_else(|| "libcuda.so.1 was not found".into()))
}

/// Paths of `lib{name}.so.{major}`, newer majors first.
fn candidates(folders: &[PathBuf], name: &str, newest: i32) -> Vec<(u32, PathBuf)> {
    let majors = MAJORS.into_iter().filter(|major| (*major * 1000).cast_signed() <= newest);
    majors
        .flat_map(|major| {
            let file = format!("lib{name}.so.{major}");
            folders.iter().map(move |folder| (major, folder.join(&file))).filter(|(_, path)| path.exists()).collect::<Vec<_>>()
        })
        .collect()
}

/// The newest NVRTC that is not newer than the driver, whose output the driver might not take.
fn find_nvrtc(folders: &[PathBuf], newest: i32) -> Result<Found, String> {
    let mut best: Option<Found> = None;
    let mut failed = None;
    for (_, path) in candidates(folders, "nvrtc", newest) {
        match super::nvrtc::Nvrtc::open(&path) {
            Ok(nvrtc) if nvrtc.version <= newest => {
                if best.as_ref().is_none_or(|best| nvrtc.version > best.version) {
                    best = Some(Found { path, version: nvrtc.version });
                }
            }
            Ok(nvrtc) => failed = Some(format!("{} is of CUDA {}, newer than the driver", path.display(), show(nvrtc.version))),
            Err(error) => failed = Some(error.message),
        }
    }
    best.ok_or_else(|| failed.unwrap_or_else(|| "libnvrtc.so.13 and libnvrtc.so.12 were not found".into()))
}

fn find_cublas(folders: &[PathBuf], newest: i32) -> Result<Found, String> {
    let mut failed = None;
    for (major, path) in candidates(folders, "cublas", newest) {
        // cuBLAS needs cuBLASLt, which may lie in a folder that the loader does not search.
        let beside = path.with_file_name(format!("libcublasLt.so.{major}"));
        match open(&beside).and_then(|light| open(&path).map(|library| (light, library))) {
            Ok((light, library)) => {
                std::mem::forget((light, library));
                return Ok(Found { path, version: (major * 1000).cast_signed() });
            }
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.unwrap_or_else(|| "libcublas.so.13 and libcublas.so.12 were not found".into()))
}

/// A version in CUDA's encoding as people write it: `13.0`.
pub fn show(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_library_that_the_driver_takes_is_tried_first() {
        let folder = tempfile::tempdir().unwrap();
        let packages = [folder.path().join("nvidia/cu13/lib"), folder.path().join("nvidia/cuda_nvrtc/lib")];
        for (packages, major) in packages.iter().zip([13, 12]) {
            std::fs::create_dir_all(packages).unwrap();
            std::fs::write(packages.join(format!("libnvrtc.so.{major}")), "").unwrap();
        }
        let majors = |newest| candidates(&packages, "nvrtc", newest).into_iter().map(|(major, _)| major).collect::<Vec<_>>();
        assert_eq!(majors(13000), [13, 12]);
        assert_eq!(majors(12080), [12]);
        assert_eq!(majors(11080), [0_u32; 0]);
    }

    #[test]
    fn a_broken_library_is_reported_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libnvrtc.so.13"), "no library").unwrap();
        let error = find_nvrtc(&[folder.path().to_owned()], 13000).unwrap_err();
        assert!(error.contains("libnvrtc.so.13"), "{error}");
    }
}
