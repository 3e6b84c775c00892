//! The tensors of a model of any format, with the least and the greatest of their first values:
//! `cargo run --release --no-default-features --example tensors fixtures/tiny-llama`

fn main() -> qconv::Result<()> {
    for path in std::env::args().skip(1) {
        let model = qconv::open(path)?;
        for tensor in model.tensors() {
            let (rows, columns) = tensor.matrix();
            let some = rows.min(16);
            let mut values = vec![0.0f32; (some * columns) as usize];
            tensor.rows(0..some, &mut values)?;
            let (least, greatest) =
                values.iter().fold((f32::MAX, f32::MIN), |(a, b), v| (v.min(a), v.max(b)));
            println!("{} {:?} {}: {least} to {greatest}", tensor.name(), tensor.shape(), tensor.encoding());
        }
    }
    Ok(())
}
