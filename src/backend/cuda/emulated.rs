//! The device that is none: the kernels' own sources, built by the machine's C++ compiler and run on the processor.
//! Slow, and proof that the kernels and what launches them compute what the CPU backend does.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::device::{Device, Element, Gemm, Grid, Pinned, Recording, TensorMap};
use super::sources::{self, Source};
use crate::error::{Error, Result};

/// As on GPUs, allocations begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Bytes in front of each allocation and behind it that are nobody's: a kernel that is wrong, as tests make them, writes there and not into the
/// process's own memory.
const APART: usize = 1 << 18;

/// What a library without a GPU is asked to do: kernel, blocks, threads, bytes of shared memory, arguments.
type Launch = unsafe extern "C" fn(*const c_char, *const u32, *const u32, u32, *mut *mut c_void) -> c_int;

/// Says in which order the threads of a block run.
type Order = unsafe extern "C" fn(c_int);

/// Kernels built for the processor.
pub struct Emulated {
    launch: Launch,
    order: Order,
    /// Keeps both callable.
    _library: Library,
    last_mark: Mutex<Instant>,
    /// What tensor maps describe: address, rows, bytes of a row. A map is the address of one, in its first word.
    #[allow(clippy::vec_box, reason = "their addresses must stay")]
    matrices: Mutex<Vec<Box<[u64; 3]>>>,
    /// What was recorded so far, while recording.
    recording: Mutex<Option<Vec<Operation>>>,
    /// Copies made ahead, which are done as late as they may be: address and bytes.
    ahead: Mutex<Vec<(u64, Vec<u8>)>>,
    /// Bytes that may be allocated, and that are.
    total: u64,
    arch: u32,
    allocated: AtomicU64,
}

/// Something a recording does.
enum Operation {
    Launch { kernel: CString, grid: Grid, arguments: Vec<u64> },
    Copy { to: u64, from: u64, bytes: usize },
    Zero { address: u64, bytes: usize },
    FromHost { address: u64, from: Arc<dyn Pinned>, bytes: usize },
}

impl Operation {
    /// # Safety
    /// As for the device's functions of the same names.
    unsafe fn run(&self, launch: Launch) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Launch { kernel, grid, arguments } => {
                    let mut values = arguments.clone();
                    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
                    let (blocks, threads) = (grid.blocks.as_ptr(), grid.threads.as_ptr());
                    let outcome = launch(kernel.as_ptr(), blocks, threads, grid.shared, pointers.as_mut_ptr());
                    if outcome != 0 {
                        let name = kernel.to_string_lossy();
                        return Err(Error::run(format!("the emulated kernel `{name}` failed with {outcome} on {grid:?}")));
                    }
                }
                Self::Copy { to, from, bytes } => std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes),
                Self::Zero { address, bytes } => (*address as *mut u8).write_bytes(0, *bytes),
                Self::FromHost { address, from, bytes } => std::ptr::copy_nonoverlapping(from.address(), *address as *mut u8, *bytes),
            }
        }
        Ok(())
    }
}

/// Operations that were recorded.
struct Recorded {
    operations: Vec<Operation>,
    launch: Launch,
}

impl Recording for Recorded {
    fn launch(&self) -> Result<()> {
        // SAFETY: what was recorded stays allocated as long as the recording.
        self.operations.iter().try_for_each(|operation| unsafe { operation.run(self.launch) })
    }
}

impl Emulated {
    /// From now on, everywhere in the process, threads of a block take turns in ascending (0) or descending order (1), or
    /// shuffled with that seed, and blocks likewise: results must not depend on it.
    pub fn set_order(&self, order: i32) {
        // SAFETY: the library is loaded and the function takes any number.
        unsafe { (self.order)(order) };
    }

    /// The same with only so many bytes of memory.
    #[must_use]
    pub fn with_memory(self, total: u64) -> Self {
        Self { total, ..self }
    }

    /// The same with the kernels that are taken on GPUs of this architecture (90 for sm_90), where other ones serve all.
    #[must_use]
    pub fn with_arch(self, arch: u32) -> Self {
        Self { arch, ..self }
    }

    /// Builds the kernels, or takes those that an earlier call built from the same sources with the same compiler.
    pub fn new() -> Result<Self> {
        Self::with_sources(sources::HEADERS, sources::KERNELS)
    }

    /// The same with other sources.
    pub fn with_sources(headers: &[Source], kernels: &[Source]) -> Result<Self> {
        let path = build(headers, kernels)?;
        let failed = |error: libloading::Error| Error::run(format!("the emulated kernels cannot be opened: {error}"));
        // SAFETY: the library was built from the sources in this program and exports this function.
        unsafe {
            let library = Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL).map_err(failed)?;
            let launch = *library.get::<Launch>("strata_launch").map_err(failed)?;
            let order = *library.get::<Order>("strata_order").map_err(failed)?;
            Ok(Self {
                launch,
                order,
                _library: library,
                last_mark: Mutex::new(Instant::now()),
                matrices: Mutex::default(),
                recording: Mutex::default(),
                ahead: Mutex::default(),
                total: 1 << 40,
                arch: 0,
                allocated: AtomicU64::new(0),
            })
        }
    }
}

/// The C++ compiler: `$CXX`, or `c++`.
pub fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// Name of what is built from these texts, and nothing else.
fn hash<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    super::nvrtc::short_hash(hash)
}

/// The headers that `text` includes, and that these include.
fn included<'a>(text: &str, headers: &'a [Source], all: &mut Vec<&'a Source>) {
    for header in headers {
        if text.contains(&format!("#include \"{}\"", header.name)) && !all.iter().any(|known| known.name == header.name) {
            all.push(header);
            included(header.text, headers, all);
        }
    }
}

/// Builds `kernels` into the user's cache, unit by unit what is not there yet, and returns the library's path.
fn build(headers: &[Source], kernels: &[Source]) -> Result<PathBuf> {
    let compiler = compiler();
    let folder = super::nvrtc::cache_directory();
    std::fs::create_dir_all(&folder).map_err(|error| Error::io("creating", &folder, &error))?;
    let object = |unit: &Source| {
        let mut own = Vec::new();
        included(unit.text, headers, &mut own);
        let texts = [compiler.as_str(), sources::EMULATION_HEADER.text, unit.name, unit.text];
        let texts = OPTIONS.into_iter().chain(texts).chain(own.into_iter().map(|header| header.text));
        folder.join(format!("emulated-{}.o", hash(texts)))
    };
    let units: Vec<(&Source, PathBuf)> = kernels.iter().chain([&sources::EMULATION]).map(|unit| (unit, object(unit))).collect();
    let objects = || units.iter().map(|(_, object)| object.as_path());
    let names: Vec<String> = objects().map(|object| object.to_string_lossy().into_owned()).collect();
    let library = folder.join(format!("emulated-{}.so", hash(names.iter().map(String::as_str))));
    if library.exists() {
        return Ok(library);
    }
    let work = tempfile::tempdir_in(&folder).map_err(|error| Error::io("creating a folder in", &folder, &error))?;
    let place = |name: &str| work.path().join(name);
    let write = |source: &Source| {
        std::fs::write(place(source.name), source.text).map_err(|error| Error::io("writing", &place(source.name), &error))
    };
    let publish = |from: &Path, to: &Path| std::fs::rename(from, to).map_err(|error| Error::io("renaming", from, &error));
    headers.iter().chain([&sources::EMULATION_HEADER]).try_for_each(write)?;
    units.par_iter().filter(|(_, object)| !object.exists()).try_for_each(|(unit, object)| {
        write(unit)?;
        let built = place(unit.name).with_extension("o");
        let mut command = Command::new(&compiler);
        command.args(OPTIONS).arg("-include").arg(place(sources::EMULATION_HEADER.name)).args(["-x", "c++", "-c", "-o"]);
        run(command.arg(&built).arg(place(unit.name)), &compiler)?;
        publish(&built, object)
    })?;
    let built = place("emulated.so");
    let mut command = Command::new(&compiler);
    run(command.args(["-shared", "-o"]).arg(&built).args(objects()), &compiler)?;
    publish(&built, &library)?;
    Ok(library)
}

/// As on the GPU, products and sums are fused only where a kernel says so.
const OPTIONS: [&str; 5] = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-w"];

fn run(command: &mut Command, compiler: &str) -> Result<()> {
    let ran = command.output().map_err(|error| {
        Error::run(format!("the C++ compiler `{compiler}` cannot be started: {error}")).hint("install g++ or clang++, or name one in CXX")
    })?;
    if ran.status.success() {
        return Ok(());
    }
    Err(Error::run(format!("the kernels do not compile for the processor:\n{}", String::from_utf8_lossy(&ran.stderr))))
}

fn layout(bytes: usize) -> Result<Layout> {
    Layout::from_size_align(bytes.max(1) + 2 * APART, ALIGNMENT).map_err(|_| Error::run(format!("{bytes} bytes are too many")))
}

/// A float that is not a number in every element type, so that what no kernel wrote is noticed.
const POISON: u8 = 0xff;

impl Device for Emulated {
    fn name(&self) -> String {
        "cuda emulated".into()
    }

    fn arch(&self) -> u32 {
        self.arch
    }

    fn multiprocessors(&self) -> usize {
        4
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((self.total - self.allocated.load(Ordering::Relaxed), self.total))
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let refused = || Error::run(format!("{bytes} bytes cannot be allocated"));
        let within = |allocated: u64| allocated.checked_add(bytes as u64).filter(|allocated| *allocated <= self.total);
        self.allocated.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).map_err(|_| refused())?;
        // SAFETY: the size is not zero.
        let address = unsafe { alloc(layout(bytes)?) };
        if address.is_null() {
            self.allocated.fetch_sub(bytes as u64, Ordering::Relaxed);
            return Err(refused());
        }
        // SAFETY: just allocated, with as much in front.
        let address = unsafe { address.add(APART) };
        // SAFETY: just allocated.
        unsafe { address.write_bytes(POISON, bytes) };
        Ok(address as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        if let Ok(layout) = layout(bytes) {
            // SAFETY: the caller's promise; `allocate` went so much further.
            unsafe { dealloc((address as *mut u8).sub(APART), layout) };
            self.allocated.fetch_sub(bytes as u64, Ordering::Relaxed);
        }
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.not_recording()?;
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        Ok(())
    }

    fn begin_ahead(&self) -> Result<()> {
        self.not_recording()
    }

    fn end_ahead(&self) -> Result<()> {
        for (address, bytes) in std::mem::take(&mut *lock(&self.ahead)) {
            // SAFETY: the promise of who asked for the copy.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        }
        Ok(())
    }

    unsafe fn upload_ahead(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.not_recording()?;
        lock(&self.ahead).push((address, bytes.to_vec()));
        Ok(())
    }

    unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.not_recording()?;
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.operate(Operation::Copy { to, from, bytes }) }
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.operate(Operation::Zero { address, bytes }) }
    }

    unsafe fn launch(&self, kernel: &str, grid: Grid, arguments: &mut [*mut c_void]) -> Result<()> {
        // As on a GPU.
        if grid.blocks[1..].iter().any(|count| *count > 65535) {
            return Err(Error::run(format!("launching `{kernel}` on {grid:?} failed: more than 65535 blocks in y or z")));
        }
        let kernel = CString::new(kernel).map_err(|_| Error::run("a kernel's name holds a zero byte"))?;
        // SAFETY: `Arguments` keeps each value in eight bytes; of a tensor map the first eight say all.
        let arguments = arguments.iter().map(|argument| unsafe { argument.cast::<u64>().read() }).collect();
        // SAFETY: the caller's promise.
        unsafe { self.operate(Operation::Launch { kernel, grid, arguments }) }
    }

    fn tensor_map(&self, address: u64, rows: usize, row_bytes: usize) -> Result<TensorMap> {
        let matrix = Box::new([address, rows as u64, row_bytes as u64]);
        let mut map = [0; 16];
        map[0] = std::ptr::from_ref(&*matrix) as u64;
        lock(&self.matrices).push(matrix);
        Ok(TensorMap(map))
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<bool> {
        if gemm.element != Element::F64 {
            return Ok(false);
        }
        let Gemm { m, n, k, a, b, c, .. } = *gemm;
        let at = |(address, stride): (u64, usize), transposed: bool, line: usize, inner: usize| {
            let index = if transposed { inner * stride + line } else { line * stride + inner };
            // SAFETY: the caller's promise.
            unsafe { (address as *const f64).add(index).read() }
        };
        for i in 0..m {
            for j in 0..n {
                let product = |inner| at(a, gemm.a_transposed, i, inner) * at(b, gemm.b_transposed, j, inner);
                let sum: f64 = (0..k).map(product).sum();
                // SAFETY: the caller's promise.
                unsafe {
                    let out = (c.0 as *mut f64).add(i * c.1 + j);
                    let before = if gemm.beta == 0.0 { 0.0 } else { f64::from(gemm.beta) * out.read() };
                    out.write(f64::from(gemm.alpha) * sum + before);
                }
            }
        }
        Ok(true)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn mark(&self) -> Result<f64> {
        let mut last = lock(&self.last_mark);
        let elapsed = last.elapsed().as_secs_f64() * 1e3;
        *last = Instant::now();
        Ok(elapsed)
    }

    fn begin_recording(&self) -> Result<()> {
        *lock(&self.recording) = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<Box<dyn Recording>> {
        let operations = lock(&self.recording).take().ok_or_else(|| Error::run("nothing is being recorded"))?;
        Ok(Box::new(Recorded { operations, launch: self.launch }))
    }

    fn pinned(&self, bytes: usize) -> Result<Arc<dyn Pinned>> {
        Ok(Arc::new(HostBytes(Mutex::new(vec![0; bytes]))))
    }

    unsafe fn copy_from_host(&self, address: u64, from: &Arc<dyn Pinned>, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.operate(Operation::FromHost { address, from: Arc::clone(from), bytes }) }
    }
}

impl Emulated {
    /// As on a GPU, a recording cannot wait for its own results or read memory that will have changed.
    fn not_recording(&self) -> Result<()> {
        if lock(&self.recording).is_some() { Err(Error::run("copies to and from the host cannot be recorded")) } else { Ok(()) }
    }

    /// Does `operation`, or notes it while recording.
    ///
    /// # Safety
    /// As for the device's functions of the same names.
    unsafe fn operate(&self, operation: Operation) -> Result<()> {
        if let Some(recording) = &mut *lock(&self.recording) {
            recording.push(operation);
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { operation.run(self.launch) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct HostBytes(Mutex<Vec<u8>>);

impl Pinned for HostBytes {
    fn write(&self, bytes: &[u8]) {
        lock(&self.0)[..bytes.len()].copy_from_slice(bytes);
    }

    fn read(&self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&lock(&self.0)[..bytes.len()]);
    }

    fn address(&self) -> *mut u8 {
        lock(&self.0).as_mut_ptr()
    }
}
