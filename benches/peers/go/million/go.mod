module million

go 1.19
