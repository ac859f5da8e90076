//! The real device: one GPU through NVIDIA's driver, one stream and another for copies made ahead, kernels compiled for it by NVRTC.

mod staging;

use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublas::{result as cublas, sys as cublas_sys};
use cudarc::driver::result::{self, DriverError, event, graph, module, stream};
use cudarc::driver::sys;
use rayon::prelude::*;

use self::staging::{PageLocked, Stage};
use super::device::{Device, Element, Gemm, Grid, Pinned, Recording, TensorMap};
use super::libraries::{DRIVER_MINIMUM, Found, HOW_TO_GET, Libraries, show};
use super::nvrtc::{self, Nvrtc};
use super::sources;
use crate::error::{Error, Result};

/// Oldest architecture: bf16 and int8 tensor cores, asynchronous copies.
pub const ARCH_MINIMUM: u32 = 80;

/// Shared memory that a block gets without asking for more.
const SHARED_DEFAULT: u32 = 48 << 10;

/// Workspace of cuBLAS: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// One GPU.
pub struct Gpu {
    name: String,
    arch: u32,
    multiprocessors: usize,
    /// Whether launches may overlap: from sm_90 on, and in recordings from CUDA 12.3 on.
    overlaps: bool,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// For copies made ahead.
    copies: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// By name: the function, and the dynamic shared memory that it may use now.
    functions: Mutex<HashMap<String, (Function, u32)>>,
    blas: Option<Blas>,
    /// Those that nobody fills now, the longest unused first; none before the first large upload.
    stages: Mutex<Option<VecDeque<Stage>>>,
    last_mark: Mutex<Option<Event>>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: handles of the driver may be used from any thread whose current context is theirs; every call below makes it so.
unsafe impl Send for Function {}
#[derive(Clone, Copy)]
struct Event(sys::CUevent);
// SAFETY: as for `Function`.
unsafe impl Send for Event {}
struct Blas {
    handle: cublas_sys::cublasHandle_t,
    workspace: u64,
}

// SAFETY: as for `Function`; cuBLAS is called under the engine's one thread at a time, its handle is not shared further.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind mutexes.
unsafe impl Sync for Gpu {}

fn failed(doing: &str, error: DriverError) -> Error {
    let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned());
    Error::run(format!("{doing} failed on the GPU: {}", text.unwrap_or_else(|| format!("{:?}", error.0))))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A GPU as `doctor` shows it.
#[derive(Debug, Clone)]
pub struct Description {
    pub name: String,
    pub arch: u32,
    pub multiprocessors: usize,
    pub memory: u64,
}

/// Starts the driver, or says why there is none to start.
fn start_driver() -> Result<()> {
    let driver = match &Libraries::get().driver {
        Ok(driver) => driver,
        Err(why) => {
            return Err(Error::input(format!("there is no GPU to compute on: no NVIDIA driver was found ({why})"))
                .hint(format!("leave --device out to compute on the processor; `strata doctor` says what is missing; {HOW_TO_GET}")));
        }
    };
    if driver.version < DRIVER_MINIMUM {
        return Err(Error::input(format!(
            "the NVIDIA driver supports CUDA {}, and strata needs {} or newer",
            show(driver.version),
            show(DRIVER_MINIMUM)
        ))
        .hint("update the driver (525.60 or newer), or leave --device out to compute on the processor"));
    }
    result::init().map_err(|error| {
        let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
        Error::input(format!("the NVIDIA driver does not start: {text}")).hint("`nvidia-smi` should list the GPU; see `strata doctor`")
    })
}

/// The GPUs that the driver shows.
pub fn devices() -> Result<Vec<Description>> {
    start_driver()?;
    let count = result::device::get_count().map_err(|error| failed("counting the GPUs", error))?;
    (0..count).map(describe).collect()
}

fn describe(index: i32) -> Result<Description> {
    let ask = || -> Result<Description, DriverError> {
        let device = result::device::get(index)?;
        // SAFETY: the driver just named the device.
        unsafe {
            let attribute = |attribute| result::device::get_attribute(device, attribute);
            let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            Ok(Description {
                name: result::device::get_name(device)?,
                arch: (10 * major + minor) as u32,
                multiprocessors: multiprocessors as usize,
                memory: result::device::total_mem(device)? as u64,
            })
        }
    };
    ask().map_err(|error| failed(&format!("asking about GPU {index}"), error))
}

/// GPU `index`, or why it cannot be used.
fn usable(index: usize) -> Result<Description> {
    let found = devices()?;
    let Some(gpu) = found.get(index) else {
        let names: Vec<String> = found.iter().enumerate().map(|(i, gpu)| format!("cuda:{i} ({})", gpu.name)).collect();
        return Err(Error::input(format!("there is no GPU {index}; the driver shows {}", found.len())).hint(if names.is_empty() {
            "leave --device out to compute on the processor".into()
        } else {
            names.join(", ")
        }));
    };
    if gpu.arch < ARCH_MINIMUM {
        return Err(Error::input(format!("{} is sm_{}, and strata's kernels need sm_{ARCH_MINIMUM} or newer", gpu.name, gpu.arch))
            .hint("take an Ampere GPU (RTX 30, A100) or newer, or leave --device out to compute on the processor"));
    }
    Ok(gpu.clone())
}

/// Whether GPU `index` and what is needed to run on it are there.
pub fn check(index: usize) -> Result<()> {
    usable(index)?;
    compiler().map(drop)
}

fn compiler() -> Result<&'static Found> {
    Libraries::get().nvrtc.as_ref().map_err(|why| {
        Error::input(format!("NVRTC, which compiles the kernels, was not found ({why})"))
            .hint(format!("`strata doctor` says where it was looked for; {HOW_TO_GET}"))
    })
}

impl Gpu {
    /// Takes GPU `index` and compiles the kernels for it, or loads them from the cache.
    pub fn new(index: usize) -> Result<Self> {
        let Description { name, arch, multiprocessors, .. } = usable(index)?;
        let cubins = compile(arch)?;
        let start = || -> Result<_, DriverError> {
            let device = result::device::get(index as i32)?;
            // SAFETY: the primary context of a device that exists, retained until the end.
            unsafe {
                let context = result::primary_ctx::retain(device)?;
                result::ctx::set_current(context)?;
                let stream = || stream::create(stream::StreamKind::NonBlocking);
                Ok((context, stream()?, stream()?))
            }
        };
        let (context, stream, copies) = start().map_err(|error| failed("starting", error))?;
        // SAFETY: NVRTC made these images for this architecture.
        let load = |cubin: &Vec<u8>| unsafe { module::load_data(cubin.as_ptr().cast()) };
        let modules = cubins.iter().map(load).collect::<Result<_, _>>().map_err(|error| failed("loading the kernels", error))?;
        let mut gpu = Self {
            name,
            arch,
            multiprocessors,
            overlaps: arch >= 90 && Libraries::get().driver.as_ref().is_ok_and(|driver| driver.version >= 12030),
            context,
            stream,
            copies,
            modules,
            functions: Mutex::default(),
            blas: None,
            stages: Mutex::default(),
            last_mark: Mutex::default(),
        };
        gpu.blas = gpu.start_blas()?;
        Ok(gpu)
    }

    fn start_blas(&self) -> Result<Option<Blas>> {
        if Libraries::get().cublas.is_err() {
            return Ok(None);
        }
        let failed = |error| Error::run(format!("cuBLAS does not start: {error:?}"));
        let handle = cublas::create_handle().map_err(failed)?;
        let workspace = self.allocate(WORKSPACE)?;
        // SAFETY: the handle was just made, the workspace stays until the handle is destroyed.
        unsafe {
            cublas::set_stream(handle, self.stream.cast()).map_err(failed)?;
            cublas_sys::cublasSetWorkspace_v2(handle, workspace as *mut c_void, WORKSPACE).result().map_err(failed)?;
        }
        Ok(Some(Blas { handle, workspace }))
    }

    /// Makes the GPU's context the calling thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(|error| failed("entering the context", error))
    }

    /// The kernel `name`, allowed `shared` bytes of dynamic shared memory.
    fn function(&self, name: &str, shared: u32) -> Result<sys::CUfunction> {
        let mut functions = lock(&self.functions);
        let known = functions.get(name).copied();
        let (function, allowed) = match known {
            Some(known) => known,
            None => {
                let wanted = CString::new(name).map_err(|_| Error::run("a kernel's name holds a zero byte"))?;
                // SAFETY: the modules stay loaded.
                let mut found = self.modules.iter().filter_map(|module| unsafe { module::get_function(*module, wanted.clone()) }.ok());
                let function = found.next().ok_or_else(|| Error::run(format!("there is no kernel `{name}`")))?;
                (Function(function), SHARED_DEFAULT)
            }
        };
        if shared > allowed {
            // SAFETY: a function of a loaded module.
            unsafe {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(function.0, attribute, shared as i32)
                    .map_err(|error| failed(&format!("giving `{name}` {shared} bytes of shared memory"), error))?;
            }
        }
        functions.insert(name.to_owned(), (function, shared.max(allowed)));
        Ok(function.0)
    }

    fn new_event() -> Result<Event> {
        event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map(Event).map_err(|error| failed("creating an event", error))
    }

    /// What comes next on `later` waits for what was asked of `earlier` so far.
    fn order(&self, earlier: sys::CUstream, later: sys::CUstream) -> Result<()> {
        self.enter()?;
        let reached = Self::new_event()?;
        // SAFETY: both streams live as long as `self`; the driver keeps a destroyed event until it was reached.
        unsafe {
            let ordered = event::record(reached.0, earlier)
                .and_then(|()| stream::wait_event(later, reached.0, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT));
            let destroyed = event::destroy(reached.0);
            ordered.and(destroyed).map_err(|error| failed("ordering two streams", error))
        }
    }
}

/// The kernels' machine code for `arch`, a file each.
fn compile(arch: u32) -> Result<Vec<Vec<u8>>> {
    let nvrtc = Nvrtc::open(&compiler()?.path)?;
    let cache = nvrtc::cache_directory();
    sources::KERNELS.par_iter().map(|source| nvrtc.compile_cached(source, arch, &cache)).collect()
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: everything was made by this struct and is not used again; failures at the end have no remedy.
        unsafe {
            let _ = stream::synchronize(self.stream);
            let _ = stream::synchronize(self.copies);
            if let Some(blas) = self.blas.take() {
                let _ = cublas::destroy_handle(blas.handle);
                self.free(blas.workspace, WORKSPACE);
            }
            for stage in lock(&self.stages).take().into_iter().flatten() {
                let _ = event::destroy(stage.copied.0);
            }
            if let Some(mark) = lock(&self.last_mark).take() {
                let _ = event::destroy(mark.0);
            }
            for module in self.modules.drain(..) {
                let _ = module::unload(module);
            }
            let _ = stream::destroy(self.copies);
            let _ = stream::destroy(self.stream);
        }
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        format!("cuda {} sm_{}", self.name, self.arch)
    }

    fn libraries(&self) -> Vec<(String, String)> {
        Libraries::get().versions()
    }

    fn arch(&self) -> u32 {
        self.arch
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(|error| failed("asking for free memory", error))?;
        Ok((free as u64, total as u64))
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: a context is current.
        unsafe { result::malloc_sync(bytes) }.map_err(|error| failed("allocating memory", error))
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        if self.enter().is_ok() {
            // SAFETY: the caller's promise; the driver waits for launches that use it.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.upload_on(self.stream, address, bytes) }
    }

    fn begin_ahead(&self) -> Result<()> {
        self.order(self.stream, self.copies)
    }

    fn end_ahead(&self) -> Result<()> {
        self.order(self.copies, self.stream)
    }

    unsafe fn upload_ahead(&self, address: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.upload_on(self.copies, address, bytes) }
    }

    unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { self.download_in_stages(address, bytes) }
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(|error| failed("copying on the GPU", error))
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream) }.map_err(|error| failed("clearing memory", error))
    }

    unsafe fn launch(&self, kernel: &str, grid: Grid, arguments: &mut [*mut c_void]) -> Result<()> {
        self.enter()?;
        let function = self.function(kernel, grid.shared)?;
        // The launch may get ready while the one before still runs; every kernel begins by waiting for it.
        let mut overlapped = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: grid.threads[0],
            blockDimY: grid.threads[1],
            blockDimZ: grid.threads[2],
            sharedMemBytes: grid.shared,
            hStream: self.stream,
            attrs: &raw mut overlapped,
            numAttrs: u32::from(self.overlaps),
        };
        // SAFETY: the caller's promise; the configuration lives until the call returns.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut()).result() }
            .map_err(|error| failed(&format!("launching `{kernel}` on {grid:?}"), error))
    }

    fn tensor_map(&self, address: u64, rows: usize, row_bytes: usize) -> Result<TensorMap> {
        self.enter()?;
        let (sizes, strides) = ([row_bytes as u64, rows as u64], [row_bytes as u64]);
        let (boxes, steps) = ([128, 64], [1, 1]);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have as many elements as the matrix has dimensions, and live until the call returns; the address is
        // only noted.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
        }
        .map_err(|error| failed(&format!("describing a matrix of {rows} rows of {row_bytes} bytes"), error))?;
        Ok(TensorMap(map.opaque))
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<bool> {
        use cublas_sys::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32I, CUBLAS_COMPUTE_64F};
        use cublas_sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        use cublas_sys::cudaDataType::{CUDA_R_8I, CUDA_R_16BF, CUDA_R_32F, CUDA_R_32I, CUDA_R_64F};
        let Some(blas) = &self.blas else { return Ok(false) };
        self.enter()?;
        let (input, output, compute) = match gemm.element {
            Element::F64 => (CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F),
            Element::F32 => (CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F),
            Element::Bf16 => (CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F),
            Element::Int8 => (CUDA_R_8I, CUDA_R_32I, CUBLAS_COMPUTE_32I),
        };
        let (alpha_int, beta_int) = (gemm.alpha as i32, gemm.beta as i32);
        let (alpha_double, beta_double) = (f64::from(gemm.alpha), f64::from(gemm.beta));
        let (alpha, beta): (*const c_void, *const c_void) = match gemm.element {
            Element::Int8 => ((&raw const alpha_int).cast(), (&raw const beta_int).cast()),
            Element::F64 => ((&raw const alpha_double).cast(), (&raw const beta_double).cast()),
            Element::F32 | Element::Bf16 => ((&raw const gemm.alpha).cast(), (&raw const gemm.beta).cast()),
        };
        // cuBLAS counts by columns: the row-major C is its Cᵀ = B·Aᵀ.
        let operation = |transposed: bool| if transposed { CUBLAS_OP_T } else { CUBLAS_OP_N };
        // SAFETY: the caller's promise; scalars live until the call returns.
        unsafe {
            cublas::gemm_ex(
                blas.handle,
                operation(!gemm.b_transposed),
                operation(gemm.a_transposed),
                gemm.n as i32,
                gemm.m as i32,
                gemm.k as i32,
                alpha,
                gemm.b.0 as *const c_void,
                input,
                gemm.b.1 as i32,
                gemm.a.0 as *const c_void,
                input,
                gemm.a.1 as i32,
                beta,
                gemm.c.0 as *mut c_void,
                output,
                gemm.c.1 as i32,
                compute,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|error| Error::run(format!("cuBLAS failed on {gemm:?}: {error:?}")))?;
        Ok(true)
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { stream::synchronize(self.stream) }.map_err(|error| failed("waiting for the kernels", error))
    }

    fn mark(&self) -> Result<f64> {
        self.enter()?;
        let failed = |error| failed("timing", error);
        let now = Self::new_event()?;
        // SAFETY: events of this context; the older one was recorded and is not used again.
        unsafe {
            event::record(now.0, self.stream).map_err(failed)?;
            event::synchronize(now.0).map_err(failed)?;
            match lock(&self.last_mark).replace(now) {
                Some(last) => {
                    let elapsed = event::elapsed(last.0, now.0).map_err(failed)?;
                    event::destroy(last.0).map_err(failed)?;
                    Ok(f64::from(elapsed))
                }
                None => Ok(0.0),
            }
        }
    }

    fn begin_recording(&self) -> Result<()> {
        self.enter()?;
        // Other calls of this thread that are no launches, allocations above all, are allowed while recording.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as `self`.
        unsafe { stream::begin_capture(self.stream, mode) }.map_err(|error| failed("starting to record", error))
    }

    fn end_recording(&self) -> Result<Box<dyn Recording>> {
        self.enter()?;
        // SAFETY: the stream records; the graph is destroyed once it has been instantiated.
        unsafe {
            let recorded = stream::end_capture(self.stream).map_err(|error| failed("recording", error))?;
            let executable = graph::instantiate(recorded, sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY);
            let _ = graph::destroy(recorded);
            let executable = executable.map_err(|error| failed("preparing a recording", error))?;
            Ok(Box::new(Graph { executable, stream: self.stream, context: self.context }))
        }
    }

    fn pinned(&self, bytes: usize) -> Result<Arc<dyn Pinned>> {
        self.enter()?;
        Ok(Arc::new(PageLocked::new(bytes)?))
    }

    unsafe fn copy_from_host(&self, address: u64, from: &Arc<dyn Pinned>, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's promise; the host memory lives as long as what was recorded with it.
        unsafe {
            let bytes = std::slice::from_raw_parts(from.address(), bytes);
            result::memcpy_htod_async(address, bytes, self.stream).map_err(|error| failed("copying to the GPU", error))
        }
    }
}

struct Graph {
    executable: sys::CUgraphExec,
    stream: sys::CUstream,
    context: sys::CUcontext,
}

// SAFETY: as for `Function`.
unsafe impl Send for Graph {}

impl Recording for Graph {
    fn launch(&self) -> Result<()> {
        // SAFETY: context and stream belong to a device that outlives what it recorded.
        unsafe {
            result::ctx::set_current(self.context).map_err(|error| failed("entering the context", error))?;
            graph::launch(self.executable, self.stream).map_err(|error| failed("launching a recording", error))
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `end_recording` and not used again.
        let _ = unsafe { graph::exec_destroy(self.executable) };
    }
}
