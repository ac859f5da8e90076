//! What a GPU can do, as a trait with two implementations: the real one ([`super::driver`]) and one that runs the same
//! kernels on the processor ([`super::emulated`]); and the memory that both hand out.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Element types of a matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F64,
    F32,
    Bf16,
    Int8,
}

/// `C[m, n] = alpha·A[m, k] · B[n, k]ᵀ + beta·C`, all row-major with these leading dimensions; `transposed` means that A
/// is `[k, m]` and B `[k, n]` instead (`AᵀB`, a gram matrix). Floats are added in f32, f64 in f64, int8 in i32.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    pub element: Element,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: (u64, usize),
    pub b: (u64, usize),
    pub c: (u64, usize),
    pub alpha: f32,
    pub beta: f32,
    /// A is `[k, m]`.
    pub a_transposed: bool,
    /// B is `[k, n]`.
    pub b_transposed: bool,
}

/// A recorded sequence of launches and copies.
pub trait Recording: Send {
    /// Does it again, with the kernels' arguments as they were.
    fn launch(&self) -> Result<()>;
}

/// A launch's place: blocks, threads of a block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub blocks: [u32; 3],
    pub threads: [u32; 3],
    pub shared: u32,
}

/// A machine that runs kernels: memory, copies, launches in order on one stream; and copies that are made *ahead*, on a stream beside
/// it.
///
/// Addresses are only ever those that `allocate` handed out and offsets into them; [`Buffer`] keeps them alive.
pub trait Device: Send + Sync {
    /// For provenance: `cuda NVIDIA H200 sm_90`.
    fn name(&self) -> String;
    /// Names and versions of driver and compiler; none where kernels are emulated.
    fn libraries(&self) -> Vec<(String, String)> {
        Vec::new()
    }
    /// 90 for sm_90; 0 where kernels are emulated.
    fn arch(&self) -> u32;
    /// Streaming multiprocessors.
    fn multiprocessors(&self) -> usize;
    /// Free and total bytes.
    fn memory(&self) -> Result<(u64, u64)>;

    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// # Safety
    /// `address` is from [`Device::allocate`] with the same size and is not used again.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// # Safety
    /// `address` is followed by as many bytes as the slice has. The same holds for the other copies.
    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<()>;
    /// # Safety
    /// As for [`Device::upload`].
    unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()>;
    /// Copies that are made ahead from now on come behind what was launched so far, and not behind what is launched after it.
    fn begin_ahead(&self) -> Result<()>;
    /// What is launched from now on comes behind the copies that were made ahead.
    fn end_ahead(&self) -> Result<()>;
    /// [`Device::upload`] ahead; never while a recording is under way.
    ///
    /// # Safety
    /// As for [`Device::upload`]; between [`Device::begin_ahead`] and [`Device::end_ahead`], and nothing launched between them reads or
    /// writes what is written.
    unsafe fn upload_ahead(&self, address: u64, bytes: &[u8]) -> Result<()>;
    /// # Safety
    /// Both addresses are followed by `bytes` bytes, and the ranges do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;
    /// # Safety
    /// As for [`Device::upload`].
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()>;

    /// # Safety
    /// `arguments` point to values of the kernel's parameter types, and what the kernel then reads and writes is
    /// allocated.
    unsafe fn launch(&self, kernel: &str, grid: Grid, arguments: &mut [*mut c_void]) -> Result<()>;
    /// How the copy engine of Hopper sees a matrix of bytes: boxes of 64 rows by 128 bytes, whose chunks are permuted as products of a
    /// warpgroup want them.
    fn tensor_map(&self, address: u64, rows: usize, row_bytes: usize) -> Result<TensorMap>;
    /// A matrix product by a library; `false` where there is none.
    ///
    /// # Safety
    /// The three matrices are allocated.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<bool>;
    /// Waits for everything launched.
    fn synchronize(&self) -> Result<()>;
    /// Time on the device between two calls, in ms: returns the time since the last mark after waiting for it.
    fn mark(&self) -> Result<f64>;

    /// Records what follows instead of doing it.
    fn begin_recording(&self) -> Result<()>;
    fn end_recording(&self) -> Result<Box<dyn Recording>>;
    /// Host memory of a fixed address that recorded copies read and kernels write: `copy_from_host` may be recorded, and reads it each
    /// time.
    fn pinned(&self, bytes: usize) -> Result<Arc<dyn Pinned>>;
    /// # Safety
    /// As for [`Device::upload`].
    unsafe fn copy_from_host(&self, address: u64, from: &Arc<dyn Pinned>, bytes: usize) -> Result<()>;
}

/// Page-locked host memory, which kernels may write.
pub trait Pinned: Send + Sync {
    /// Replaces the beginning. Whoever calls it has waited for copies under way.
    fn write(&self, bytes: &[u8]);
    /// Copies the beginning. Whoever calls it has waited for the kernels that write it.
    fn read(&self, bytes: &mut [u8]);
    fn address(&self) -> *mut u8;
}

/// Sizes at and above this are rounded up to a multiple of it, smaller ones to [`SMALL`]: buffers are reused by size.
const LARGE: usize = 1 << 21;
const SMALL: usize = 512;

pub(super) fn rounded(bytes: usize) -> usize {
    let bytes = bytes.max(1);
    if bytes >= LARGE { bytes.next_multiple_of(LARGE) } else { bytes.next_multiple_of(SMALL) }
}

/// Memory of a device, kept for reuse when buffers are dropped. Everything runs on one stream, in order, so a buffer may
/// be handed out again while earlier launches still use it. Copies made ahead are the exception: they write buffers that were free
/// before they began, and one of theirs that is dropped before they end serves nobody until then.
pub struct Memory {
    pub device: Arc<dyn Device>,
    free: Mutex<FreeLists>,
    in_use: AtomicU64,
    peak: AtomicU64,
}

#[derive(Default)]
struct FreeLists {
    /// By rounded size: address, and how often copies ahead had begun when it was given back.
    shared: HashMap<usize, Vec<(u64, u64)>>,
    /// How often copies ahead have begun, and whether they are under way.
    begun: u64,
    ahead: bool,
    /// Size and address of what was written ahead and given back since.
    written: Vec<(usize, u64)>,
    /// What a recording has taken and given back: only it may use these again, for its launches name their addresses.
    recording: Option<u64>,
    next_recording: u64,
    private: HashMap<(u64, usize), Vec<u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FreeLists {
    fn give_back(&mut self, size: usize, address: u64) {
        let begun = self.begun;
        self.shared.entry(size).or_default().push((address, begun));
    }
}

impl Memory {
    pub fn new(device: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { device, free: Mutex::default(), in_use: AtomicU64::new(0), peak: AtomicU64::new(0) })
    }

    /// Bytes in buffers now, and the most there were since [`Memory::reset_peak`].
    pub fn usage(&self) -> (u64, u64) {
        (self.in_use.load(Ordering::Relaxed), self.peak.load(Ordering::Relaxed))
    }

    pub fn reset_peak(&self) {
        self.peak.store(self.in_use.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// A buffer of `bytes` bytes, whose contents are whatever was there.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let size = rounded(bytes);
        let (reused, owner) = {
            let mut free = lock(&self.free);
            match free.recording {
                Some(recording) => (free.private.get_mut(&(recording, size)).and_then(Vec::pop), Owner::Recording(recording)),
                None => (free.shared.get_mut(&size).and_then(Vec::pop).map(|(address, _)| address), Owner::Everyone),
            }
        };
        self.buffer(reused, bytes, owner)
    }

    /// A buffer for copies ahead: new, or given back before they began.
    pub fn allocate_ahead(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let (reused, begun) = {
            let mut free = lock(&self.free);
            let begun = free.begun;
            let waiting = free.shared.entry(rounded(bytes)).or_default();
            let index = waiting.iter().position(|(_, given_back)| *given_back < begun);
            (index.map(|index| waiting.swap_remove(index).0), begun)
        };
        self.buffer(reused, bytes, Owner::Ahead(begun))
    }

    fn buffer(self: &Arc<Self>, reused: Option<u64>, bytes: usize, owner: Owner) -> Result<Buffer> {
        let size = rounded(bytes);
        let address = match reused {
            Some(address) => address,
            None => self.allocate_new(size)?,
        };
        let now = self.in_use.fetch_add(size as u64, Ordering::Relaxed) + size as u64;
        self.peak.fetch_max(now, Ordering::Relaxed);
        Ok(Buffer { address, bytes, size, owner, memory: Arc::clone(self) })
    }

    /// Copies ahead begin; `false`, with nothing done: not while a recording is under way, or others are.
    pub fn begin_ahead(&self) -> Result<bool> {
        let mut free = lock(&self.free);
        if free.ahead || free.recording.is_some() {
            return Ok(false);
        }
        self.device.begin_ahead()?;
        free.begun += 1;
        free.ahead = true;
        Ok(true)
    }

    /// They end: what is launched from now on may read what they wrote.
    pub fn end_ahead(&self) -> Result<()> {
        self.device.end_ahead()?;
        let mut free = lock(&self.free);
        free.ahead = false;
        for (size, address) in std::mem::take(&mut free.written) {
            free.give_back(size, address);
        }
        Ok(())
    }

    fn allocate_new(&self, size: usize) -> Result<u64> {
        if let Ok(address) = self.device.allocate(size) {
            return Ok(address);
        }
        // What lies in the free lists may be of other sizes.
        self.release()?;
        self.device.allocate(size).map_err(|error| {
            let (in_use, _) = self.usage();
            let (free, total) = self.device.memory().unwrap_or((0, 0));
            let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / (1_u64 << 30) as f64);
            error
                .context(format!(
                    "the GPU's memory is exhausted: {} more were asked for, {} are in use, {} of {} are free",
                    gib(size as u64),
                    gib(in_use),
                    gib(free),
                    gib(total)
                ))
                .hint("take a narrower format, shorter sequences or fewer of them at a time, a larger GPU, or --device cpu")
        })
    }

    /// Gives everything that is not in use back to the device.
    pub fn release(&self) -> Result<()> {
        self.device.synchronize()?;
        let lists = std::mem::take(&mut lock(&self.free).shared);
        for (size, addresses) in lists {
            for (address, _) in addresses {
                // SAFETY: addresses in the free lists came from `allocate` with that size, and no buffer holds them.
                unsafe { self.device.free(address, size) };
            }
        }
        Ok(())
    }

    /// Buffers that are allocated and dropped from now on belong to a recording; returns its number.
    pub fn begin_private(&self) -> u64 {
        let mut free = lock(&self.free);
        let recording = free.next_recording;
        free.next_recording += 1;
        free.recording = Some(recording);
        recording
    }

    pub fn end_private(&self) {
        lock(&self.free).recording = None;
    }

    /// The recording is gone: its buffers serve everyone.
    pub fn drop_private(&self, recording: u64) {
        let mut free = lock(&self.free);
        let sizes: Vec<usize> = free.private.keys().filter(|(owner, _)| *owner == recording).map(|(_, size)| *size).collect();
        for size in sizes {
            for address in free.private.remove(&(recording, size)).unwrap_or_default() {
                free.give_back(size, address);
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let lists = std::mem::take(&mut *lock(&self.free));
        let private =
            lists.private.into_iter().flat_map(|((_, size), addresses)| addresses.into_iter().map(move |address| (size, address)));
        let shared = lists.shared.into_iter().flat_map(|(size, addresses)| addresses.into_iter().map(move |(address, _)| (size, address)));
        for (size, address) in shared.chain(private).chain(lists.written) {
            // SAFETY: as in `release`; buffers hold the memory alive, so there are none left.
            unsafe { self.device.free(address, size) };
        }
    }
}

/// Whom a buffer serves when it is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Everyone,
    /// The recording of this number.
    Recording(u64),
    /// Everyone, once copies ahead that had begun so often have ended.
    Ahead(u64),
}

/// Memory on the device; goes back to the free lists when dropped.
pub struct Buffer {
    address: u64,
    bytes: usize,
    size: usize,
    owner: Owner,
    memory: Arc<Memory>,
}

impl Buffer {
    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes `values` to the beginning.
    pub fn upload<T: Plain>(&self, values: &[T]) -> Result<()> {
        self.upload_at(0, values)
    }

    /// Writes `values` from value `at` on.
    pub fn upload_at<T: Plain>(&self, at: usize, values: &[T]) -> Result<()> {
        let (at, bytes) = (at * size_of::<T>(), as_bytes(values));
        self.check(at, bytes.len())?;
        // SAFETY: checked to lie inside.
        unsafe { self.memory.device.upload(self.address + at as u64, bytes) }
    }

    /// Writes `values` to the beginning of a buffer of [`Memory::allocate_ahead`], before the copies ahead end.
    pub fn upload_ahead<T: Plain>(&self, values: &[T]) -> Result<()> {
        let bytes = as_bytes(values);
        self.check(0, bytes.len())?;
        // SAFETY: checked to lie inside; the buffer was free before the copies ahead began, and who makes it hands it out when they
        // have ended.
        unsafe { self.memory.device.upload_ahead(self.address, bytes) }
    }

    /// Reads `count` values from the beginning.
    pub fn download<T: Plain>(&self, count: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); count];
        self.download_at(0, &mut values)?;
        Ok(values)
    }

    /// Reads `values` from value `at` on.
    pub fn download_at<T: Plain>(&self, at: usize, values: &mut [T]) -> Result<()> {
        let (at, count) = (at * size_of::<T>(), size_of_val(values));
        self.check(at, count)?;
        // SAFETY: the slice has that many bytes, any of which are values of a plain type; checked to lie inside.
        unsafe {
            self.memory.device.download(self.address + at as u64, std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), count))
        }
    }

    /// Copies `bytes` bytes from another buffer.
    pub fn copy_from(&self, at: usize, from: &Self, from_at: usize, bytes: usize) -> Result<()> {
        self.check(at, bytes)?;
        from.check(from_at, bytes)?;
        // SAFETY: checked to lie inside; buffers do not overlap.
        unsafe { self.memory.device.copy(self.address + at as u64, from.address + from_at as u64, bytes) }
    }

    pub fn zero(&self) -> Result<()> {
        // SAFETY: the whole buffer.
        unsafe { self.memory.device.zero(self.address, self.bytes) }
    }

    fn check(&self, at: usize, bytes: usize) -> Result<()> {
        if at + bytes <= self.bytes {
            return Ok(());
        }
        Err(Error::run(format!("{bytes} bytes at {at} do not lie in a device buffer of {}", self.bytes)))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.in_use.fetch_sub(self.size as u64, Ordering::Relaxed);
        let mut free = lock(&self.memory.free);
        match self.owner {
            Owner::Recording(recording) => free.private.entry((recording, self.size)).or_default().push(self.address),
            Owner::Ahead(begun) if free.ahead && free.begun == begun => free.written.push((self.size, self.address)),
            Owner::Ahead(_) | Owner::Everyone => free.give_back(self.size, self.address),
        }
    }
}

/// Types that any bytes are values of.
pub trait Plain: Copy + Default + 'static {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for i32 {}
impl Plain for f32 {}
impl Plain for f64 {}

pub fn as_bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain types have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// A matrix as the copy engine sees it; see [`Device::tensor_map`].
#[derive(Debug, Clone, Copy)]
pub struct TensorMap(pub [u64; 16]);

/// A kernel's arguments in order.
#[derive(Clone, Default)]
pub struct Arguments {
    /// Each value in eight bytes of its own, a tensor map in 128.
    values: Vec<u64>,
    /// Where in `values` each argument begins.
    starts: Vec<usize>,
}

/// What a kernel takes: an address, an `int` or a `float`.
pub trait Argument {
    fn bits(&self) -> u64;
}

impl Argument for u64 {
    fn bits(&self) -> u64 {
        *self
    }
}

impl Argument for usize {
    /// An `int`.
    fn bits(&self) -> u64 {
        u64::from((*self as i32).cast_unsigned())
    }
}

impl Argument for i32 {
    fn bits(&self) -> u64 {
        u64::from(self.cast_unsigned())
    }
}

impl Argument for f32 {
    fn bits(&self) -> u64 {
        u64::from(self.to_bits())
    }
}

impl Argument for bool {
    fn bits(&self) -> u64 {
        u64::from(*self)
    }
}

impl Argument for &Buffer {
    fn bits(&self) -> u64 {
        self.address
    }
}

impl Argument for Option<&Buffer> {
    /// A null pointer for none.
    fn bits(&self) -> u64 {
        self.map_or(0, Buffer::address)
    }
}

impl Arguments {
    #[must_use]
    #[allow(clippy::needless_pass_by_value, reason = "arguments are references and numbers")]
    pub fn with(mut self, argument: impl Argument) -> Self {
        self.starts.push(self.values.len());
        self.values.push(argument.bits());
        self
    }

    #[must_use]
    pub fn with_map(mut self, map: &TensorMap) -> Self {
        self.starts.push(self.values.len());
        self.values.extend(map.0);
        self
    }

    /// These arguments, then `more`.
    #[must_use]
    pub fn then(mut self, more: &Self) -> Self {
        let first = self.values.len();
        self.starts.extend(more.starts.iter().map(|start| first + start));
        self.values.extend(&more.values);
        self
    }

    /// Launches `kernel` with these arguments.
    ///
    /// # Safety
    /// They are what the kernel takes, and what it then reads and writes is allocated.
    pub unsafe fn launch(mut self, device: &dyn Device, kernel: &str, grid: Grid) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let values = self.values.as_mut_ptr();
        let mut pointers: Vec<*mut c_void> = self.starts.iter().map(|start| values.wrapping_add(*start).cast()).collect();
        // SAFETY: the caller's promise; little-endian machines find an int or float in the first four bytes.
        unsafe { device.launch(kernel, grid, &mut pointers) }
    }
}
