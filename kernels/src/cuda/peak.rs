//! Peak rates of known devices: what utilisation is a share of. A device that is not listed has no known peak, and no
//! utilisation is said of it.

/// Dense bf16 products with f32 sums, by the driver's product name, in TFLOP/s. Sources, all NVIDIA, as others quote them (of
/// their own text only a table that has 312 for the A100, and a rounded 1,000 for the H100 before its clocks were known, was seen):
/// "H100 Tensor Core GPU Architecture" (whitepaper, 2022), table of H100 SXM5: 989.4 dense, 1,978.9 with sparsity;
/// "H200 Tensor Core GPU" (data sheet, 2024), SXM: 1,979 with sparsity, the same chip and clocks;
/// "A100 Tensor Core GPU Architecture" (whitepaper, 2020) and data sheet, SXM and PCIe: 312 dense.
/// Other forms of these chips (NVL, H100 PCIe) have other clocks, and are left out.
const DENSE_BF16_TFLOPS: [(&str, f64); 6] = [
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H200", 989.4),
    ("NVIDIA A100-SXM4-40GB", 312.0),
    ("NVIDIA A100-SXM4-80GB", 312.0),
    ("NVIDIA A100-PCIE-40GB", 312.0),
    ("NVIDIA A100 80GB PCIe", 312.0),
];

/// Peak rate of dense bf16 products of the device of this product name, in FLOP/s; none where it is not known.
#[must_use]
pub fn dense_bf16_flops_per_s(name: &str) -> Option<f64> {
    let known = DENSE_BF16_TFLOPS.iter().find(|(known, _)| *known == name);
    known.map(|(_, tflops)| tflops * 1e12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_names_are_known() {
        assert_eq!(dense_bf16_flops_per_s("NVIDIA H100 80GB HBM3"), Some(989.4e12));
        for unknown in ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA H100", "recorder", ""] {
            assert_eq!(dense_bf16_flops_per_s(unknown), None, "{unknown}");
        }
    }
}
