//! What NVIDIA's management library says of the GPUs. It is looked for at run time; where it is not, there is nothing
//! to say.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;

/// A GPU at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuReading {
    pub name: String,
    pub used_bytes: u64,
    pub total_bytes: u64,
    /// Share of the last sample period in which a kernel ran, in percent.
    pub utilization: u32,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Milliwatts.
    pub power: Option<u32>,
}

/// Reads the GPUs of this machine.
pub struct GpuMonitor {
    library: Nvml,
}

impl GpuMonitor {
    /// Nothing on a machine without NVIDIA's driver.
    pub fn find() -> Option<Self> {
        Nvml::init().ok().map(|library| Self { library })
    }

    /// Every GPU that answers.
    pub fn read(&self) -> Vec<GpuReading> {
        let count = self.library.device_count().unwrap_or(0);
        (0..count).filter_map(|index| self.reading(index)).collect()
    }

    fn reading(&self, index: u32) -> Option<GpuReading> {
        let device = self.library.device_by_index(index).ok()?;
        let memory = device.memory_info().ok()?;
        Some(GpuReading {
            name: device.name().unwrap_or_else(|_| format!("GPU {index}")),
            used_bytes: memory.used,
            total_bytes: memory.total,
            utilization: device.utilization_rates().map_or(0, |rates| rates.gpu),
            temperature: device.temperature(TemperatureSensor::Gpu).ok(),
            power: device.power_usage().ok(),
        })
    }
}
