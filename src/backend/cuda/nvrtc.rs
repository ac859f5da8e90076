//! NVRTC, CUDA's run-time compiler, and the cache of what it compiled.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use sha2::{Digest, Sha256};

use super::sources::{self, Source};
use crate::error::{Error, Result};

type Program = *mut c_void;
type GetSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Create = unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int;

/// The functions of an NVRTC library, which stays open.
pub struct Nvrtc {
    /// CUDA's encoding, 13000 for 13.0.
    pub version: i32,
    create: Create,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    cubin_size: GetSize,
    cubin: GetBytes,
    log_size: GetSize,
    log: GetBytes,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

impl Nvrtc {
    /// Opens the library at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error: libloading::Error| Error::run(format!("NVRTC cannot be used: {}: {error}", path.display()));
        // It opens its built-in functions by name, which lie beside it, where the loader need not look.
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        for builtins in std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())) {
            if builtins.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("libnvrtc-builtins.so")) {
                // SAFETY: a library of data and plain functions; it stays open. One that does not open is not needed.
                if let Ok(library) = unsafe { Library::open(Some(&builtins), RTLD_NOW | RTLD_GLOBAL) } {
                    std::mem::forget(library);
                }
            }
        }
        // SAFETY: the functions have these signatures in every NVRTC since CUDA 11.1, and the library stays open.
        unsafe {
            let library = Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL).map_err(failed)?;
            let version = *library.get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>("nvrtcVersion").map_err(failed)?;
            let (mut major, mut minor) = (0, 0);
            if version(&raw mut major, &raw mut minor) != 0 {
                return Err(Error::run(format!("NVRTC at {} does not tell its version", path.display())));
            }
            let nvrtc = Self {
                version: 1000 * major + 10 * minor,
                create: *library.get("nvrtcCreateProgram").map_err(failed)?,
                compile: *library.get("nvrtcCompileProgram").map_err(failed)?,
                cubin_size: *library.get("nvrtcGetCUBINSize").map_err(failed)?,
                cubin: *library.get("nvrtcGetCUBIN").map_err(failed)?,
                log_size: *library.get("nvrtcGetProgramLogSize").map_err(failed)?,
                log: *library.get("nvrtcGetProgramLog").map_err(failed)?,
                destroy: *library.get("nvrtcDestroyProgram").map_err(failed)?,
            };
            std::mem::forget(library);
            Ok(nvrtc)
        }
    }

    /// Compiles one kernel file to machine code for `arch` (90 for sm_90).
    pub fn compile(&self, source: &Source, arch: u32) -> Result<Vec<u8>> {
        self.compile_with(source, arch, &[]).map(|(cubin, _)| cubin)
    }

    /// What each kernel of a file takes of a multiprocessor of `arch`, as the assembler tells; files may be empty for some.
    pub fn resources(&self, source: &Source, arch: u32) -> Result<Vec<KernelResources>> {
        let (_, log) = self.compile_with(source, arch, &["--ptxas-options=-v"])?;
        if !log.contains("ptxas info") {
            return Err(Error::run(format!("NVRTC tells nothing about {}", source.name)).hint("NVRTC 12.0 and newer do"));
        }
        Ok(parse_resources(&log))
    }

    /// Machine code and the compiler's log.
    fn compile_with(&self, source: &Source, arch: u32, more: &[&str]) -> Result<(Vec<u8>, String)> {
        let text = |text: &str| CString::new(text).map_err(|_| Error::run(format!("{} holds a zero byte", source.name)));
        let (body, name) = (text(source.text)?, text(source.name)?);
        let headers = sources::HEADERS.iter().map(|header| Ok((text(header.name)?, text(header.text)?))).collect::<Result<Vec<_>>>()?;
        let header_names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let header_texts: Vec<*const c_char> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let options = options(arch).iter().map(String::as_str).chain(more.iter().copied()).map(text).collect::<Result<Vec<_>>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // SAFETY: every pointer is to a zero-terminated string that outlives the call, counts match their arrays, and
        // output buffers have the sizes that NVRTC asks for.
        unsafe {
            let created = (self.create)(
                &raw mut program,
                body.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            );
            if created != 0 {
                return Err(Error::run(format!("NVRTC takes no program (error {created})")));
            }
            let compiled = (self.compile)(program, options.len() as c_int, options.as_ptr());
            let log = Self::read(program, self.log_size, self.log).unwrap_or_default();
            let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned()).unwrap_or_default();
            let outcome = if compiled == 0 {
                Self::read(program, self.cubin_size, self.cubin).map(|cubin| (cubin, log))
            } else {
                Err(Error::run(format!("{} does not compile for sm_{arch} with NVRTC {}:\n{log}", source.name, self.version))
                    .hint("please report this with the log above"))
            };
            (self.destroy)(&raw mut program);
            outcome
        }
    }

    /// # Safety
    /// `size` and `bytes` are a pair of NVRTC's functions, and `program` is one that they may be asked about.
    unsafe fn read(program: Program, size: GetSize, bytes: GetBytes) -> Result<Vec<u8>> {
        let mut count = 0;
        // SAFETY: the caller's promise; the buffer has the size that was asked for.
        unsafe {
            if size(program, &raw mut count) == 0 {
                let mut out = vec![0; count];
                if bytes(program, out.as_mut_ptr().cast()) == 0 {
                    return Ok(out);
                }
            }
        }
        Err(Error::run("NVRTC does not hand out what it compiled"))
    }

    /// [`Nvrtc::compile`], or what an earlier call wrote to `cache` for the same source, architecture and compiler.
    pub fn compile_cached(&self, source: &Source, arch: u32, cache: &Path) -> Result<Vec<u8>> {
        let mut hash = Sha256::new();
        for part in sources::HEADERS.iter().chain([source]).flat_map(|source| [source.name, source.text]) {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        hash.update(format!("{:?} nvrtc {}", options(arch), self.version));
        let hash = short_hash(hash);
        let path = cache.join(format!("{}-sm_{arch}-{hash}.cubin", source.name.trim_end_matches(".cu")));
        if let Ok(bytes) = std::fs::read(&path) {
            return Ok(bytes);
        }
        let compiled = self.compile(source, arch)?;
        // A cache that cannot be written costs the next start some seconds, which is no reason to fail this one.
        if std::fs::create_dir_all(cache).is_ok() {
            drop(crate::files::write_atomically(&path, &compiled));
        }
        Ok(compiled)
    }
}

/// What a kernel takes of a multiprocessor.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KernelResources {
    pub name: String,
    /// Of each thread.
    pub registers: u32,
    /// Stored to and loaded from local memory because registers ran out.
    pub spill_bytes: u32,
    /// Declared statically.
    pub shared_bytes: u32,
}

/// Reads the assembler's verbose output: per kernel a line that names it, one with its spills, one with its registers.
fn parse_resources(log: &str) -> Vec<KernelResources> {
    let number = |text: &str, before: &str| -> u32 {
        let Some(end) = text.find(before) else { return 0 };
        text[..end].trim_end().rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
    };
    let mut found: Vec<KernelResources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(KernelResources { name, registers: 0, spill_bytes: 0, shared_bytes: 0 });
        } else if let Some(kernel) = found.last_mut() {
            if line.contains("bytes spill stores") {
                kernel.spill_bytes = number(line, " bytes spill stores") + number(line, " bytes spill loads");
            } else if line.contains("Used ") && line.contains(" registers") {
                (kernel.registers, kernel.shared_bytes) = (number(line, " registers"), number(line, " bytes smem"));
            }
        }
    }
    found
}

/// What NVRTC is asked for. Products and sums are only fused where a kernel says so, so that integer linears give the
/// CPU's bits.
pub fn options(arch: u32) -> Vec<String> {
    // Hopper's warpgroup products are of its own architecture only.
    let arch = if arch == super::wgmma::ARCH { "90a".to_owned() } else { arch.to_string() };
    vec![format!("--gpu-architecture=sm_{arch}"), "--std=c++17".into(), "--fmad=false".into(), "-default-device".into()]
}

/// The first 64 bits of a hash, for the names of cached files.
pub(super) fn short_hash(hash: Sha256) -> String {
    let first = hash.finalize().first_chunk::<8>().copied().unwrap_or_default();
    format!("{:016x}", u64::from_be_bytes(first))
}

/// The folder of compiled kernels in the user's cache.
pub fn cache_directory() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    base.or_else(home).unwrap_or_else(std::env::temp_dir).join("strata").join("kernels")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_read_from_the_assemblers_output() {
        let log = "ptxas info    : Compiling entry function 'add' for 'sm_90'\nptxas info    : Function properties for add\n    \
            16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\nptxas info    : Used 44 registers, used 1 barriers, \
            1024 bytes smem, 400 bytes cmem[0]\nptxas info    : Compiling entry function 'b' for 'sm_90'\n    0 bytes stack frame, 0 \
            bytes spill stores, 0 bytes spill loads\nptxas info    : Used 8 registers\n";
        let resources =
            |name: &str, registers, spill_bytes, shared_bytes| KernelResources { name: name.into(), registers, spill_bytes, shared_bytes };
        assert_eq!(parse_resources(log), [resources("add", 44, 20, 1024), resources("b", 8, 0, 0)]);
    }
}
