//! Recording
#[test]
fn report() {
    println!("{}", regrow::map::record_loaded_objects());
    let r = regrow::map::record_loaded_objects();
    println!("{}", r);
}
